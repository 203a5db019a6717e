"""Parameters become tokens: the lecture's `generate`, with a KV cache.

The model always sees the last block_size tokens. While they all fit, the cache makes a
token cost one position. Beyond that every position shifts, nothing cached holds, and
the whole window is read again for each token, as the lecture does.

Rows of a batch end at the same column; a shorter one begins later, at column first_B.

B batch   T time (block_size)   V vocab
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import SamplingConfig, check_seed
from jaxgpt.generation.sampling import sample
from jaxgpt.models import GPT
from jaxgpt.models.cache import KVCache, empty_cache
from jaxgpt.models.gpt import unstacked
from jaxgpt.training.sharding import over_rows, replicated, row_mesh

TOKENS_PER_CALL = 16
# Devices share the rows where each has so many to draw with the cache, or any number
# without it. On 2 cores 64 rows of the 10.8M model then take 25 ms a token, not 34, 16
# no less than before, and 8 beyond the window 169 ms, not 201.
ROWS_OF_A_DEVICE = 8
_SMALLEST_BUCKET = 16


def generate_tokens(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 1337,
) -> Iterator[np.ndarray]:
    """Continues each prompt, and yields new tokens a few at a time, the first alone.

    Compiles once for each batch size, sampling config and power of two that the longest
    prompt fits into. A prompt that all rows share is read once. This process's devices
    draw a share of the rows each, where there are enough (`row_mesh`).

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

    texts = [np.asarray(prompt[-T:], np.int32) for prompt in prompts]
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(len(prompts))
    )
    length, drawn, logits_BV, cache = max(map(len, texts)), 0, None, None
    params = jax.jit(unstacked)(params) if isinstance(model, GPT) else params
    if isinstance(model, GPT) and length < T:  # else the window is read in any case
        shared = all(np.array_equal(text, texts[0]) for text in texts)
        bucket = min(T, max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()))
        aligned = _aligned(texts[:1] if shared else texts, length, bucket)
        logits_BV, cache = _read_prompts(model, params, *aligned, length, len(texts))
    least = ROWS_OF_A_DEVICE if cache else 1
    mesh = row_mesh(model.config, params, len(texts), least)
    if mesh:
        params = jax.device_put(params, replicated(mesh))
    row_keys_B, logits_BV, cache = _over_rows((row_keys_B, logits_BV, cache), mesh)
    while drawn < max_new_tokens:
        count = min(TOKENS_PER_CALL if drawn else 1, max_new_tokens - drawn)
        if cache and length < T:
            count = min(count, T - length)
            tokens, logits_BV, cache = _draw_cached(
                model, sampling, params, logits_BV, cache, row_keys_B, drawn, count
            )
        else:
            tokens = _draw_windowed(
                model,
                sampling,
                params,
                *_over_rows(_aligned(texts, T, T), mesh),
                row_keys_B,
                drawn,
                count,
            )
        tokens = np.asarray(tokens)[:, :count]
        texts = [np.append(*row)[-T:] for row in zip(texts, tokens, strict=True)]
        length, drawn = length + count, drawn + count
        yield tokens


def _aligned(
    texts: list[np.ndarray], end: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """The texts as rows of `columns` that all end before column `end`, and first_B."""
    first_B = np.array([end - len(text) for text in texts], np.int32)
    rows = zip(texts, first_B, strict=True)
    tokens = [np.pad(text, (first, columns - end)) for text, first in rows]
    return np.stack(tokens), first_B


def _over_rows(arrays: Any, mesh: Mesh | None) -> Any:
    """Cuts each array's first axis, of rows or of rows and heads, over the devices.

    Each holds scalars whole. Without a mesh all stays where it is.
    """
    if mesh is None:
        return arrays
    rows, whole = over_rows(mesh), replicated(mesh)
    where = jax.tree.map(lambda array: rows if np.ndim(array) else whole, arrays)
    return jax.device_put(arrays, where)


@partial(jax.jit, static_argnums=(0, 5))
def _read_prompts(
    model: GPT,
    params: Any,
    tokens_BT: jax.Array,
    first_B: jax.Array,
    length: jax.Array,
    batch_size: int,
) -> tuple[jax.Array, KVCache]:
    """Reads the first `length` columns, of one row for all `batch_size` or of each.

    Returns the logits of the next tokens and a cache with room for block_size.
    """
    bucket = tokens_BT.shape[1]
    cache = empty_cache(model.config, first_B, bucket)
    logits_BV, cache = model.apply(
        {"params": params}, tokens_BT, length, cache, method=GPT.decode
    )
    room = ((0, 0), (0, model.config.block_size - bucket), (0, 0))

    times = batch_size // len(first_B)

    def grown(layers: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(jnp.tile(jnp.pad(a, room), (times, 1, 1)) for a in layers)

    cache = KVCache(
        grown(cache.keys),
        grown(cache.values),
        cache.length,
        jnp.repeat(first_B, times),
    )
    return jnp.repeat(logits_BV, times, axis=0), cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _draw_cached(
    model: GPT,
    sampling: SamplingConfig,
    params: Any,
    logits_BV: jax.Array,
    cache: KVCache,
    row_keys_B: jax.Array,
    drawn: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Draws `count` tokens of each row, and reads each.

    Returns them as the first of i32 [B, TOKENS_PER_CALL], the logits of the next, and
    the cache.
    """

    def step(i: jax.Array, carry: Any) -> Any:
        tokens, logits_BV, cache = carry
        new_B = sample(logits_BV, _keys(row_keys_B, drawn + i), sampling)
        logits_BV, cache = model.apply(
            {"params": params}, new_B[:, None], 1, cache, method=GPT.decode
        )
        return tokens.at[:, i].set(new_B), logits_BV, cache

    no_tokens = jnp.zeros((len(row_keys_B), TOKENS_PER_CALL), jnp.int32)
    return jax.lax.fori_loop(0, count, step, (no_tokens, logits_BV, cache))


@partial(jax.jit, static_argnums=(0, 1))
def _draw_windowed(
    model: nn.Module,
    sampling: SamplingConfig,
    params: Any,
    window_BT: jax.Array,
    first_B: jax.Array,
    row_keys_B: jax.Array,
    drawn: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Draws `count` tokens of each row, and reads the window again for each.

    Returns them as the first of i32 [B, TOKENS_PER_CALL].
    """

    def step(i: jax.Array, carry: Any) -> Any:
        tokens, window_BT, first_B = carry
        logits_BV = _read_window(model, params, window_BT, first_B)
        new_B = sample(logits_BV, _keys(row_keys_B, drawn + i), sampling)
        window_BT = jnp.append(window_BT[:, 1:], new_B[:, None], axis=1)
        return tokens.at[:, i].set(new_B), window_BT, jnp.maximum(first_B - 1, 0)

    no_tokens = jnp.zeros((len(row_keys_B), TOKENS_PER_CALL), jnp.int32)
    tokens, _, _ = jax.lax.fori_loop(0, count, step, (no_tokens, window_BT, first_B))
    return tokens


def _keys(row_keys_B: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(row_keys_B, index)


def _read_window(
    model: nn.Module, params: Any, window_BT: jax.Array, first_B: jax.Array
) -> jax.Array:
    """Logits after each row's window, f32 [B, V]."""
    T = window_BT.shape[1]
    if isinstance(model, GPT):
        cache = empty_cache(model.config, first_B, T)
        logits_BV, _ = model.apply(
            {"params": params}, window_BT, T, cache, method=GPT.decode
        )
        return logits_BV
    rolled_BT = jax.vmap(jnp.roll)(window_BT, -first_B)
    logits_BTV = model.apply({"params": params}, rolled_BT)
    last_B11 = T - 1 - first_B[:, None, None]
    return jnp.take_along_axis(logits_BTV, last_B11, axis=1)[:, 0]
