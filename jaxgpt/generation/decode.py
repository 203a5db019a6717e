"""Parameters become tokens: the lecture's `generate`, with a KV cache.

The model always sees the last block_size tokens. While they all fit, the cache makes a
token cost one position. Beyond that every position shifts, nothing cached holds, and
the whole window is read again for each token, as the lecture does.

B batch   T time (block_size)   V vocab
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import SamplingConfig, check_seed
from jaxgpt.generation.sampling import sample
from jaxgpt.models import GPT
from jaxgpt.models.cache import KVCache, empty_cache

TOKENS_PER_CALL = 16
_SMALLEST_BUCKET = 16


@flax.struct.dataclass
class DecodeState:
    """What generation carries from token to token.

    Attributes:
      window_BT: each row's last tokens, i32, from the left; the rest is padding.
      length_B: tokens in the window, i32, from 1 to T.
      cache: of the window's tokens; None if the model has none.
      logits_BV: of the next token, f32.
    """

    window_BT: jax.Array
    length_B: jax.Array
    cache: KVCache | None
    logits_BV: jax.Array


def generate_tokens(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 1337,
) -> Iterator[np.ndarray]:
    """Continues each prompt, and yields new tokens a few at a time.

    Compiles once for each batch size, sampling config and power of two that the longest
    prompt fits into.

    Args:
      prompts: B lists of token ids, of any lengths from 1; the model sees the last
        block_size of each.
      max_new_tokens: to draw in all for each prompt.
      sampling: how tokens are drawn.
      seed: row b's tokens are a function of its prompt, (seed, b) and the model.

    Yields i32 [B, n], where the n sum to max_new_tokens. Raises ValueError on a prompt
    that is empty or has ids outside the vocabulary, and on a top_k above its size.
    """
    sampling = sampling or SamplingConfig()
    V, T = model.config.vocab_size, model.config.block_size
    if sampling.top_k is not None and sampling.top_k > V:
        raise ValueError(f"top_k={sampling.top_k} is above vocab_size={V}")
    check_seed(seed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    for prompt in prompts:
        if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < V:
            raise ValueError(f"a prompt needs token ids from 0 to {V - 1}: {prompt}")

    windows = [np.asarray(prompt[-T:], np.int32) for prompt in prompts]
    length_B = np.array([len(window) for window in windows], np.int32)
    bucket = min(T, max(_SMALLEST_BUCKET, 1 << (int(length_B.max()) - 1).bit_length()))
    tokens_BT = np.stack([np.pad(w, (0, bucket - len(w))) for w in windows])
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(len(prompts))
    )
    state = _read_prompts(model, params, tokens_BT, length_B)
    for drawn in range(0, max_new_tokens, TOKENS_PER_CALL):
        state, tokens = _draw(model, sampling, params, state, row_keys_B, drawn)
        yield np.asarray(tokens)[:, : max_new_tokens - drawn]


@partial(jax.jit, static_argnums=0)
def _read_prompts(
    model: nn.Module, params: Any, tokens_BT: jax.Array, length_B: jax.Array
) -> DecodeState:
    """Reads the prompts, padded to a bucket, all at once."""
    logits_BV, cache = _read_window(model, params, tokens_BT, length_B)
    padding = model.config.block_size - tokens_BT.shape[1]
    window_BT = jnp.pad(tokens_BT, ((0, 0), (0, padding)))
    return DecodeState(window_BT, length_B, cache, logits_BV)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _draw(
    model: nn.Module,
    sampling: SamplingConfig,
    params: Any,
    state: DecodeState,
    row_keys_B: jax.Array,
    drawn: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Draws TOKENS_PER_CALL tokens; returns them as i32 [B, TOKENS_PER_CALL]."""

    def step(state: DecodeState, index: jax.Array) -> tuple[DecodeState, jax.Array]:
        keys_B = jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, index)
        tokens_B = sample(state.logits_BV, keys_B, sampling)
        return _append(model, params, state, tokens_B), tokens_B

    indices = drawn + jnp.arange(TOKENS_PER_CALL)
    state, tokens = jax.lax.scan(step, state, indices)
    return state, tokens.T


def _append(
    model: nn.Module, params: Any, state: DecodeState, tokens_B: jax.Array
) -> DecodeState:
    """Puts a token at the end of each window and reads on."""
    B, T = state.window_BT.shape
    full_B = state.length_B == T
    window_BT = jnp.where(
        full_B[:, None], jnp.roll(state.window_BT, -1, axis=1), state.window_BT
    )
    length_B = jnp.minimum(state.length_B + 1, T)
    window_BT = window_BT.at[jnp.arange(B), length_B - 1].set(tokens_B)

    def read_window() -> tuple[jax.Array, KVCache | None]:
        return _read_window(model, params, window_BT, length_B)

    def read_token() -> tuple[jax.Array, KVCache | None]:
        return model.apply(
            {"params": params},
            tokens_B[:, None],
            jnp.ones_like(length_B),
            state.cache,
            method=GPT.decode,
        )

    if state.cache is None:
        logits_BV, cache = read_window()
    else:
        logits_BV, cache = jax.lax.cond(full_B.any(), read_window, read_token)
    return DecodeState(window_BT, length_B, cache, logits_BV)


def _read_window(
    model: nn.Module, params: Any, tokens_BT: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, KVCache | None]:
    """Logits [B, V] after each row's `length_B` tokens, and their cache."""
    if isinstance(model, GPT):
        cache = empty_cache(model.config, len(tokens_BT))
        return model.apply(
            {"params": params}, tokens_BT, length_B, cache, method=GPT.decode
        )
    logits_BTV = model.apply({"params": params}, tokens_BT)
    last_B1V = jnp.take_along_axis(logits_BTV, length_B[:, None, None] - 1, axis=1)
    return last_B1V[:, 0], None
