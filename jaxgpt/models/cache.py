"""The KV cache: keys and values of the positions a model has read.

L layers   B batch   S slots (block_size)   H heads   D head_dim
"""

import flax.struct
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """An argument and a result of `GPT.decode`.

    Attributes:
      keys_LBSHD, values_LBSHD: of every layer, in the compute dtype.
      length_B: positions filled in, i32; slots from there on hold nothing of use.
    """

    keys_LBSHD: jax.Array
    values_LBSHD: jax.Array
    length_B: jax.Array


def empty_cache(config: ModelConfig, batch_size: int) -> KVCache:
    """A cache for `batch_size` rows that have read nothing yet."""
    shape = (
        config.n_layer,
        batch_size,
        config.block_size,
        config.n_head,
        config.head_dim,
    )
    zeros = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
    return KVCache(zeros, zeros, jnp.zeros(batch_size, jnp.int32))
