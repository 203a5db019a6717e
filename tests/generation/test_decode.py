from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import SamplingConfig
from jaxgpt.generation import decode
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.generation.sampling import scores
from jaxgpt.models import build_model

T = TINY.model.block_size
V = TINY.model.vocab_size
PROMPTS = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=T + 4), min_size=2, max_size=2
)
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=1.0, top_k=8)


def tokens_of(model, params, prompts, count, sampling=GREEDY, seed=0):
    pieces = list(generate_tokens(model, params, prompts, count, sampling, seed))
    return np.concatenate(pieces, axis=1)


@partial(jax.jit, static_argnums=0)
def apply(model, params, tokens):
    return model.apply({"params": params}, tokens)


def lecture_logits(model, params, contexts):
    """The lecture's generate: a full pass over each context's last tokens."""
    windows = [context[-T:] for context in contexts]
    padded = np.array([window + [0] * (T - len(window)) for window in windows])
    last = np.array([len(window) - 1 for window in windows])
    return np.asarray(apply(model, params, padded))[np.arange(len(windows)), last]


def assert_follows_the_lecture(model, params, prompts, drawn, sampling, seed):
    """Each token is the lecture's, wherever its score is clearly the largest."""
    count = drawn.shape[1]
    for row, prompt in enumerate(prompts):
        contexts = [prompt + drawn[row, :i].tolist() for i in range(count)]
        logits = lecture_logits(model, params, contexts)
        row_key = jax.random.fold_in(jax.random.key(seed), row)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, np.arange(count))
        row_scores = np.asarray(scores(jnp.asarray(logits), keys, sampling))
        gaps = row_scores.max(axis=1) - row_scores[np.arange(count), drawn[row]]
        assert (gaps < 1e-4).all()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@given(prompts=PROMPTS, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None)
def test_text_is_the_lectures_across_the_windows_edge(
    tiny_model, sampling, prompts, seed
):
    model, params = tiny_model
    drawn = tokens_of(model, params, prompts, 2 * T + 2, sampling, seed)
    assert drawn.shape == (2, 2 * T + 2)
    assert_follows_the_lecture(model, params, prompts, drawn, sampling, seed)


def test_logits_are_the_lectures_across_the_windows_edge(tiny_model):
    model, params = tiny_model
    prompts = [[3, 1], [4, 1, 5, 9, 2]]
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.stack([np.pad(p, (0, T - len(p))) for p in prompts])
    state = decode._read_prompts(model, params, padded.astype(np.int32), lengths)
    append = jax.jit(decode._append, static_argnums=0)
    cached = 0
    for token in range(3 * T):
        expected = lecture_logits(model, params, prompts)
        np.testing.assert_allclose(state.logits_BV, expected, atol=1e-4)
        new = jnp.array([token % V, (token * 7) % V])
        cached += not (state.length_B == T).any()
        state = append(model, params, state, new)
        prompts = [[*p, int(t)] for p, t in zip(prompts, new, strict=True)]
    assert cached == T - 5  # until the longer row filled its window


def test_the_cache_is_read_inside_the_window_and_not_beyond_it(tiny_model):
    model, params = tiny_model
    append = jax.jit(decode._append, static_argnums=0)
    for length, reads_cache in ((T - 1, True), (T, False)):
        window = np.arange(T, dtype=np.int32)[None]
        state = decode._read_prompts(model, params, window, np.array([length]))
        spoilt = state.replace(cache=jax.tree.map(jnp.ones_like, state.cache))
        spoilt = spoilt.replace(cache=spoilt.cache.replace(length_B=state.length_B))
        token = jnp.array([5])
        same = np.array_equal(
            append(model, params, state, token).logits_BV,
            append(model, params, spoilt, token).logits_BV,
        )
        assert same != reads_cache


def test_models_without_a_cache_generate_too(bigram):
    model, params = bigram
    prompts = [[3], [4, 1, 5]]
    drawn = tokens_of(model, params, prompts, 20, SAMPLED, seed=1)
    assert_follows_the_lecture(model, params, prompts, drawn, SAMPLED, 1)


def test_the_same_seed_gives_the_same_tokens_and_rows_differ(tiny_model):
    model, params = tiny_model
    prompts = [[3, 1]] * 3
    one = tokens_of(model, params, prompts, 40, SAMPLED, seed=1)
    np.testing.assert_array_equal(
        one, tokens_of(model, params, prompts, 40, SAMPLED, seed=1)
    )
    assert not np.array_equal(
        one, tokens_of(model, params, prompts, 40, SAMPLED, seed=2)
    )
    assert not np.array_equal(one[0], one[1])


def test_a_row_does_not_depend_on_the_others_nor_on_how_many_tokens_follow(tiny_model):
    model, params = tiny_model
    alone = tokens_of(model, params, [[3, 1]], 5, SAMPLED)
    among = tokens_of(model, params, [[3, 1], [7]], 40, SAMPLED)
    np.testing.assert_array_equal(alone[0], among[0, :5])


def test_prompts_of_all_lengths_share_a_program_per_power_of_two():
    config = changed(TINY, model={"block_size": 64}).model
    model = build_model(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    reads, draws = decode._read_prompts._cache_size(), decode._draw._cache_size()
    for length in range(1, 70):
        next(generate_tokens(model, params, [[1] * length], 1))
    assert decode._read_prompts._cache_size() - reads == 3  # up to 16, 32 and 64
    assert decode._draw._cache_size() - draws == 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "a prompt needs token ids from 0 to 10"),
        ([[11]], {}, "a prompt needs token ids from 0 to 10"),
        ([[-1]], {}, "a prompt needs token ids from 0 to 10"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([[1]], {"sampling": SamplingConfig(top_k=12)}, "top_k=12 is above vocab_size"),
    ],
)
def test_what_cannot_be_generated_is_an_error(tiny_model, prompts, options, message):
    options = {"max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=message):
        next(generate_tokens(*tiny_model, prompts, **options))
