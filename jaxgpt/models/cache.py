"""The KV cache: keys and values of the positions a model has read.

L layers   B batch   N rows and heads (B n_head)   S slots   D head_dim
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """An argument and a result of `GPT.decode`.

    All rows end at the same slot, so that each new token is written in one place; rows
    with fewer tokens begin later.

    Attributes:
      keys, values: of each of L layers [N, S, D], in the compute dtype.
      length: slots filled in, i32 scalar; those from there on hold nothing of use.
      first_B: the slot of each row's first token, i32.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    first_B: jax.Array


def empty_cache(config: ModelConfig, first_B: jax.Array, slots: int) -> KVCache:
    """A cache for rows that have read nothing yet, and begin at slots first_B."""
    shape = (len(first_B) * config.n_head, slots, config.head_dim)
    empty = (jnp.zeros(shape, jnp.dtype(config.compute_dtype)),) * config.n_layer
    return KVCache(empty, empty, jnp.zeros((), jnp.int32), first_B)
