"""Beam search: the likeliest output of an encoder-decoder for each source.

N sources   K beams   B rows (N K)   S source time   T block_size   V vocab

Each source has K rows of one `DecodingState`, which hold the K best hypotheses so far.
A hypothesis that has ended keeps its row, so the search is narrower for the others.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxgpt.generation.decode import (
    DecodingState,
    append,
    next_logits,
    prefill,
    unstack_layers,
)
from jaxgpt.parallel.mesh import batch_sharding
from jaxgpt.text.examples import Sequences, bucket_of


class Hypothesis(NamedTuple):
    """An output for a source.

    Attributes:
      tokens: token ids, i32, with the end token unless the output was cut.
      log_prob: the model's log-probability of these tokens, in nats.
      score: `log_prob` with the length penalty.
    """

    tokens: np.ndarray
    log_prob: float
    score: float


def penalized(log_prob: Array, length: Array, length_penalty: Array) -> Array:
    """Score of an output of `length` tokens, which favours longer ones.

    Source: Wu et al. 2016, section 7, without its coverage penalty.
    """
    return log_prob / ((5 + length) / 6) ** length_penalty


def beam_search(
    model: nn.Module,
    params: Any,
    sources: Sequences,
    end_token: int,
    *,
    beams: int,
    length_penalty: float,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    mesh: Mesh | None = None,
    advance: Callable[[int], object] = lambda sources: None,
) -> list[Hypothesis]:
    """Finds the output with the best score for each source, as far as the beams reach.

    One beam is greedy decoding. An output does not depend on the other sources. Sources
    are sorted by length, so that those of a batch need little padding. Compiles once
    for each number of beams, batch size and bucket of source lengths.

    Args:
      sources: token ids, 1 to block_size of each.
      end_token: begins and ends each output.
      beams: hypotheses that are kept for each source (K).
      length_penalty: exponent of the penalty; 0 compares log-probabilities.
      max_new_tokens: an output is cut there; block_size, the largest, by default.
      batch_size: sources that are searched at once (N).
      mesh: devices to shard the batch over, which hold the parameters.
      advance: called with the number of sources in each batch, to show progress.

    Raises ValueError if an argument is out of range.
    """
    T, V = model.config.block_size, model.config.vocab_size
    max_new_tokens = T if max_new_tokens is None else max_new_tokens
    for name, value in (("beams", beams), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= length_penalty <= 10:
        raise ValueError(f"length_penalty={length_penalty} must be from 0 to 10")
    if not 1 <= max_new_tokens <= T:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be from 1 to {T}")
    lengths, tokens = sources.lengths.astype(np.int32), sources.tokens
    if np.any((lengths < 1) | (lengths > T)) or np.any((tokens < 0) | (tokens >= V)):
        raise ValueError(f"a source needs 1 to {T} token ids from 0 to {V - 1}")
    params = unstack_layers(params)
    order = np.argsort(lengths, kind="stable")
    found: dict[int, Hypothesis] = {}
    for start in range(0, len(order), batch_size):
        ids = order[start : start + batch_size]
        row_N = np.resize(ids, batch_size)  # the last batch repeats some
        S = int(bucket_of(lengths[row_N], T).max())
        source: Any = sources.padded(row_N, S), lengths[row_N]
        if mesh:
            source = jax.device_put(source, batch_sharding(mesh))
        inputs = params, source, np.float32(length_penalty), max_new_tokens
        results = map(np.asarray, _search(model, beams, end_token, *inputs))
        for id_, tokens_T, length, *scores in zip(ids, *results, strict=False):
            found[id_] = Hypothesis(tokens_T[:length], *map(float, scores))
        advance(len(ids))
    return [found[id_] for id_ in range(len(sources))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    model: nn.Module,
    beams: int,
    end_token: int,
    params: Any,
    source: tuple[Array, Array],
    length_penalty: Array,
    max_new_tokens: Array,
) -> tuple[Array, Array, Array, Array]:
    """Searches a batch of sources: source_NS, i32, padded on the right, and lengths_N.

    Returns tokens, i32 [N, T], their number, i32 [N], and log_prob and score, f32 [N].
    """
    N, K = len(source[0]), beams
    score = partial(penalized, length_penalty=length_penalty)

    def scores(state: DecodingState, log_prob_NK: Array) -> tuple[Array, Array]:
        """The score of every hypothesis, and -inf for those that have not ended."""
        score_NK = score(log_prob_NK, state.drawn_B.reshape(N, K))
        ended_NK = state.finished_B.reshape(N, K)
        return score_NK, jnp.where(ended_NK, score_NK, -jnp.inf)

    def is_unfinished(carry: tuple[DecodingState, Array, Array]) -> Array:
        state, log_prob_NK, count = carry
        open_B = ~state.finished_B & (log_prob_NK.reshape(N * K) > -jnp.inf)
        return (count < max_new_tokens) & open_B.any()

    def step(
        carry: tuple[DecodingState, Array, Array],
    ) -> tuple[DecodingState, Array, Array]:
        state, log_prob_NK, count = carry
        logits_BV, caches = next_logits(model, params, replace(state, memory=memory))
        state, V = replace(state, caches=caches), logits_BV.shape[1]
        before_NK1, ended_NK1 = (
            log_prob_NK[..., None],
            state.finished_B.reshape(N, K, 1),
        )
        next_NKV = before_NK1 + jax.nn.log_softmax(logits_BV).reshape(N, K, V)
        # A hypothesis that has ended has one continuation, itself, which is kept.
        itself_NKV = jnp.where(jnp.arange(V) == end_token, before_NK1, -jnp.inf)
        next_NKV = jnp.where(ended_NK1, itself_NKV, next_NKV)
        is_kept_NKV = ended_NK1 & (next_NKV > -jnp.inf)
        rank_NKV = jnp.where(is_kept_NKV, jnp.inf, next_NKV)
        _, best_NK = jax.lax.top_k(rank_NKV.reshape(N, K * V), K)
        log_prob_NK = jnp.take_along_axis(next_NKV.reshape(N, K * V), best_NK, axis=1)
        token_B = (best_NK % V).reshape(N * K)
        state = append(_select(state, best_NK // V), token_B, (end_token,))
        # An open hypothesis is given up if it can't beat one that has ended.
        _, ended_score_NK = scores(state, log_prob_NK)
        least_N1 = ended_score_NK.max(axis=1, keepdims=True)
        is_beaten_NK = score(log_prob_NK, max_new_tokens) <= least_N1
        is_beaten_NK &= ~state.finished_B.reshape(N, K)
        return state, jnp.where(is_beaten_NK, -jnp.inf, log_prob_NK), count + 1

    first_N1 = jnp.full((N, 1), end_token, jnp.int32)
    state = prefill(model, params, first_N1, jnp.ones(N, jnp.int32), None, True, source)
    state = _select(state, jnp.zeros((N, K), jnp.int32))
    memory = state.memory  # is the same for all rows of a source
    # All rows begin alike, so only the first of each source is a possible hypothesis.
    log_prob_NK = jnp.tile(jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf), (N, 1))
    carry = replace(state, memory=None), log_prob_NK, jnp.int32(0)
    state, log_prob_NK, _ = jax.lax.while_loop(is_unfinished, step, carry)

    score_NK, ended_score_NK = scores(state, log_prob_NK)
    has_ended_N1 = ended_score_NK.max(axis=1, keepdims=True) > -jnp.inf
    score_NK = jnp.where(has_ended_N1, ended_score_NK, score_NK)
    best_N1 = score_NK.argmax(axis=1, keepdims=True)
    state = _select(state, best_N1)
    start_N = state.length_B - state.drawn_B
    tokens_NT = jax.vmap(jnp.roll)(state.tokens_BT, -start_N)
    log_prob_N = jnp.take_along_axis(log_prob_NK, best_N1, axis=1)[:, 0]
    return tokens_NT, state.drawn_B, log_prob_N, score_NK.max(axis=1)


def _select(state: DecodingState, row_NK: Array) -> DecodingState:
    """The state of K rows of each source, which are numbered within the source."""
    N, rows = len(row_NK), len(state.length_B)

    def select(a: Array) -> Array:
        a_NR = a.reshape(N, rows // N, -1, *a.shape[1:])
        return jax.vmap(lambda a, row_K: a[row_K])(a_NR, row_NK).reshape(
            -1, *a.shape[1:]
        )

    return jax.tree.map(select, state)
