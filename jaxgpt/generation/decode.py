"""Autoregressive decoding: the lecture's `generate`, with a KV cache.

The model always sees the last block_size tokens. Until the text fills this window, the
KV cache lets each step compute a single position. After that every step shifts all
positions and invalidates the cache, so it recomputes the whole window, as the lecture
does.

An encoder-decoder's encoder runs once, in `prefill`; its output is part of the state.

B batch   T time (block_size)   S source time   V vocab   N tokens per dispatch
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgpt.config import SamplingConfig, check_seed
from jaxgpt.generation.sampling import sample
from jaxgpt.models.layers import Memory, take
from jaxgpt.ops.attention import KV
from jaxgpt.parallel.mesh import batch_sharding, data_parallel_mesh, replicated

TOKENS_PER_CALL = 16
# Rows are sharded over devices if each gets this many, or one if there is no cache.
# On 2 cores this takes 64 rows of the 10.8M model from 34 to 25 ms per token, gains
# nothing for 16 rows, and takes 8 rows beyond the window from 201 to 169 ms.
MIN_ROWS_PER_DEVICE = 8
_SMALLEST_BUCKET = 16


@flax.struct.dataclass
class DecodingState:
    """The state of a batch of sequences; axis 0 is the row, in caches row and head.

    Attributes:
      tokens_BT: the last block_size tokens of each row, padded on the right, i32.
      length_B: number of these tokens before the padding, i32.
      key_B: PRNG key of each row; its n-th token is sampled with fold_in(key, n). None
        if nothing is sampled.
      drawn_B: number of tokens sampled so far, i32.
      finished_B: whether the row has sampled an end token; it then no longer changes.
      caches: keys and values of each layer for all tokens but the last, which the next
        step adds; None if each step recomputes the whole window.
      memory: each layer's keys and values of the source; None without an encoder.
    """

    tokens_BT: Array
    length_B: Array
    key_B: Any
    drawn_B: Array
    finished_B: Array
    caches: tuple[KV, ...] | None
    memory: tuple[Memory, ...] | None = None


class LateEnds(NamedTuple):
    """Tokens that end a row only as its `first`-th new token or a later one."""

    tokens: tuple[int, ...]
    first: int


NO_LATE_ENDS = LateEnds((), 0)


@partial(jax.jit, static_argnums=(0, 5))
def prefill(
    model: nn.Module,
    params: Any,
    prompts_BT: Array,
    length_B: Array,
    key_B: Array | None,
    cached: bool,
    source: tuple[Array, Array] | None = None,
) -> DecodingState:
    """Processes the prompts; returns the state before the first token is sampled.

    Args:
      params: parameters as `unstack_layers` returns them.
      prompts_BT: token ids, i32, padded on the right; a single one serves all of key_B.
      length_B: number of tokens in each prompt, from 1 to T.
      key_B: PRNG keys, one for each row of the state; None if nothing is sampled.
      cached: whether to keep the keys and values of the prompts.
      source: an encoder-decoder's source_BS, i32, padded on the right, and lengths_B.
    """
    (B, T), rows = prompts_BT.shape, len(prompts_BT if key_B is None else key_B)
    tokens_BT = jnp.pad(prompts_BT, ((0, 0), (0, model.config.block_size - T)))
    apply, caches, memory = partial(model.apply, {"params": params}), None, None
    if source is not None:
        memory = apply(*source, method="encode")
    if cached:
        inputs = prompts_BT, length_B - 1, None, model.init_cache(B), memory
        _, caches = apply(*inputs, method="next_token_logits")
    tokens_BT, length_B, *kept = jax.tree.map(
        lambda a: jnp.tile(a, (rows // B, *(1,) * (a.ndim - 1))),
        (tokens_BT, jnp.asarray(length_B), caches, memory),
    )
    drawn_B, finished_B = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    return DecodingState(tokens_BT, length_B, key_B, drawn_B, finished_B, *kept)


def next_logits(
    model: nn.Module, params: Any, state: DecodingState
) -> tuple[Array, tuple[KV, ...] | None]:
    """Logits of each row's next token, f32 [B, V], and the caches with its last one."""
    tokens_BT, last_B, caches = state.tokens_BT, state.length_B - 1, state.caches
    apply = partial(model.apply, {"params": params})
    if not hasattr(model, "next_token_logits"):
        return take(apply(tokens_BT), last_B)[:, 0], None
    apply = partial(apply, memory=state.memory, method="next_token_logits")
    if caches is None:
        return apply(tokens_BT, last_B)[0], None
    return apply(take(tokens_BT, last_B), jnp.zeros_like(last_B), last_B, caches)


def append(
    state: DecodingState,
    token_B: Array,
    end_tokens: tuple[int, ...],
    late_ends: LateEnds = NO_LATE_ENDS,
) -> DecodingState:
    """Appends a token, i32, to each row; end tokens finish it.

    A full window drops its first token. A finished row does not change.
    """
    tokens_BT, length_B, finished_B = state.tokens_BT, state.length_B, state.finished_B
    T = tokens_BT.shape[1]
    kept_BT = jnp.where((length_B == T)[:, None], jnp.roll(tokens_BT, -1, 1), tokens_BT)
    new_BT = jnp.arange(T) == jnp.minimum(length_B, T - 1)[:, None]
    appended_BT = jnp.where(new_BT, token_B[:, None], kept_BT)
    ends_B = jnp.isin(token_B, jnp.array(end_tokens, jnp.int32))
    if late_ends.tokens:
        is_late_B = state.drawn_B + 1 >= late_ends.first
        ends_B |= is_late_B & jnp.isin(token_B, jnp.array(late_ends.tokens))
    return replace(
        state,
        tokens_BT=jnp.where(finished_B[:, None], tokens_BT, appended_BT),
        length_B=jnp.where(finished_B, length_B, jnp.minimum(length_B + 1, T)),
        drawn_B=state.drawn_B + ~finished_B,
        finished_B=finished_B | ends_B,
    )


def decode_step(
    model: nn.Module,
    sampling: SamplingConfig,
    end_tokens: tuple[int, ...],
    params: Any,
    state: DecodingState,
    late_ends: LateEnds = NO_LATE_ENDS,
) -> tuple[DecodingState, tuple[Array, Array]]:
    """Samples the next token of each row; the arguments are those of `append`.

    Returns the new state, each row's token i32 [B], and its log-probability f32 [B] in
    nats, before temperature, top_k and top_p. A finished row repeats its end token,
    with a log-probability of 0.
    """
    logits_BV, caches = next_logits(model, params, state)
    state, finished_B = replace(state, caches=caches), state.finished_B
    key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.drawn_B)
    token_B = sample(logits_BV, key_B, sampling)
    log_prob_B = take(jax.nn.log_softmax(logits_BV), token_B)[:, 0]
    last_token_B = take(state.tokens_BT, state.length_B - 1)[:, 0]
    token_B = jnp.where(finished_B, last_token_B, token_B)
    log_prob_B = jnp.where(finished_B, 0, log_prob_B)
    state = append(state, token_B, end_tokens, late_ends)
    return state, (token_B, log_prob_B)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    model: nn.Module,
    sampling: SamplingConfig,
    end_tokens: tuple[int, ...],
    params: Any,
    state: DecodingState,
    count: Array,
) -> tuple[DecodingState, Array, Array]:
    """Runs `count` decoding steps, at most TOKENS_PER_CALL (N), in one dispatch.

    Returns the new state, and tokens i32 [B, N] and log-probabilities f32 [B, N], whose
    first `count` columns are valid.
    """

    def step(i: Array, carry: Any) -> Any:
        state, *drawn = carry
        state, new = decode_step(model, sampling, end_tokens, params, state)
        return state, *(a.at[:, i].set(b) for a, b in zip(drawn, new, strict=True))

    shape = (len(state.length_B), TOKENS_PER_CALL)
    drawn = jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
    return jax.lax.fori_loop(0, count, step, (state, *drawn))


@jax.jit
def unstack_layers(params: Any) -> Any:
    """Splits stacked layer parameters, if any, into a tuple with a tree per layer.

    XLA would slice each layer from the stack for every token, which takes 3 times as
    long. The result is a copy: during generation the layers take twice their memory.
    """
    stack = params.get("h", ())
    if isinstance(stack, tuple):
        return params
    n_layer = len(jax.tree.leaves(stack)[0])
    layers = (jax.tree.map(operator.itemgetter(i), stack) for i in range(n_layer))
    return {**params, "h": tuple(layers)}


def generate_tokens(
    model: nn.Module,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seed: int = 1337,
    end_tokens: tuple[int, ...] = (),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Continues each prompt; yields new tokens a few at a time, the first one alone.

    Compiles once for each batch size, sampling config and length of the longest prompt,
    rounded up to a power of two. A prompt that all rows share is processed once. Rows
    are sharded over this process's devices if there are enough (`data_parallel_mesh`).

    Args:
      prompts: B lists of token ids, each with at least one; the model sees the last
        block_size of each.
      max_new_tokens: number of tokens to generate for each prompt.
      seed: row b's tokens are a function of its prompt, (seed, b) and the model.
      end_tokens: a row ends with the first of these that it samples, and repeats it
        while other rows continue; generation ends when all rows have ended.

    Yields tokens i32 [B, n] and log-probabilities f32 [B, n], as `decode_step` returns
    them; the n sum to max_new_tokens, or less if all rows end. Raises ValueError if a
    prompt is empty or has ids outside the vocabulary, or top_k is above vocab_size.
    """
    sampling = sampling or SamplingConfig()
    V, T = model.config.vocab_size, model.config.block_size
    check_sampling(V, max_new_tokens, sampling, seed)
    for prompt in prompts:
        if not len(prompt) or not 0 <= min(prompt) <= max(prompt) < V:
            raise ValueError(f"a prompt needs token ids from 0 to {V - 1}: {prompt}")

    params = unstack_layers(params)
    texts = [np.asarray(prompt[-T:], np.int32) for prompt in prompts]
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    key_B = fold_in(jax.random.key(seed), jnp.arange(len(texts)))
    if all(np.array_equal(text, texts[0]) for text in texts):
        texts = texts[:1]
    length_B = np.array([len(text) for text in texts], np.int32)
    longest = int(length_B.max())
    bucket = min(T, max(_SMALLEST_BUCKET, 1 << (longest - 1).bit_length()))
    prompts_BT = np.stack([np.pad(text, (0, bucket - len(text))) for text in texts])
    cached = hasattr(model, "init_cache") and longest < T
    state = prefill(model, params, prompts_BT, length_B, key_B, cached)
    params, state = _shard_rows(model, params, state)
    drawn, active_B = 0, np.ones(len(prompts), bool)
    while drawn < max_new_tokens and active_B.any():
        longest = drawn + int(np.max(length_B * active_B))
        if state.caches is not None and longest > T:
            state = replace(state, caches=None)
            params, state = _shard_rows(model, params, state)
        count = min(TOKENS_PER_CALL if drawn else 1, max_new_tokens - drawn)
        if state.caches is not None:
            count = min(count, T + 1 - longest)
        state, *new = decode(model, sampling, end_tokens, params, state, count)
        tokens, log_probs = (np.asarray(array)[:, :count] for array in new)
        yield tokens, log_probs
        drawn += count
        if end_tokens:
            active_B = ~np.asarray(state.finished_B)


def check_sampling(
    vocab_size: int, max_new_tokens: int, sampling: SamplingConfig, seed: int
) -> None:
    """Raises ValueError if an argument of `generate_tokens` is out of range."""
    if sampling.top_k is not None and sampling.top_k > vocab_size:
        raise ValueError(
            f"top_k={sampling.top_k} is above vocab_size={vocab_size}; lower it"
        )
    check_seed(seed)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")


def _shard_rows(
    model: nn.Module, params: Any, state: DecodingState
) -> tuple[Any, DecodingState]:
    """Shards the rows over this process's devices if there are enough rows."""
    min_rows = 1 if state.caches is None else MIN_ROWS_PER_DEVICE
    mesh = data_parallel_mesh(model.config, params, len(state.length_B), min_rows)
    if mesh is None:
        return params, state
    return jax.device_put((params, state), (replicated(mesh), batch_sharding(mesh)))
