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


def tokens_of(model, params, prompts, count, sampling=GREEDY, seed=0, end_tokens=()):
    pieces = generate_tokens(model, params, prompts, count, sampling, seed, end_tokens)
    return np.concatenate([tokens for tokens, _ in pieces], axis=1)


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


def started(model, params, prompts, cached):
    """The state of prompts of any lengths, and the parameters it is decoded with."""
    tokens_BT = np.array([prompt + [0] * (T - len(prompt)) for prompt in prompts])
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    keys_B = jax.random.split(jax.random.key(0), len(prompts))
    params = decode.unstack_layers(params)
    return params, decode.prefill(model, params, tokens_BT, length_B, keys_B, cached)


@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_unequal_length_have_the_logits_of_each_alone(
    tiny_model, monkeypatch, cached
):
    model, params = tiny_model
    prompts, seen = [[3], [4, 1, 5, 9, 2], [7, 7, 7]], []

    def noted(logits_BV, keys_B, sampling):
        seen.append(logits_BV)
        return (logits_BV.argmax(-1) + 1) % V  # other tokens than the likeliest

    monkeypatch.setattr(decode, "sample", noted)
    layers, state = started(model, params, prompts, cached)
    steps = T + 1 - 5 if cached else 2 * T  # until the longest row leaves the window
    for _ in range(steps):
        state, (token_B, log_prob_B) = decode.decode_step(
            model, GREEDY, (), layers, state
        )
        expected_BV = lecture_logits(model, params, prompts)
        np.testing.assert_allclose(seen[-1], expected_BV, atol=2e-5)
        log_probs_BV = jax.nn.log_softmax(expected_BV)
        chosen_B = np.take_along_axis(log_probs_BV, token_B[:, None], 1)[:, 0]
        np.testing.assert_allclose(log_prob_B, chosen_B, atol=2e-5)
        prompts = [[*p, int(t)] for p, t in zip(prompts, token_B, strict=True)]
        for row, prompt in enumerate(prompts):
            count = int(state.length_B[row])
            assert state.tokens_BT[row, :count].tolist() == prompt[-T:]


def test_the_cache_is_read_inside_the_window_and_not_beyond_it(tiny_model, monkeypatch):
    model, params = tiny_model
    calls, call = [], decode.decode

    def noted(*args):
        calls.append((args[-2].caches is not None, int(args[-1])))
        return call(*args)

    monkeypatch.setattr(decode, "decode", noted)
    tokens_of(model, params, [[1, 2], [3, 4, 5]], 2 * T)
    # The first token alone; the last that the cache serves makes T + 1.
    assert calls == [(True, 1), (True, T - 3), (False, 2 * T - (T - 2))]


def test_a_prompt_that_all_rows_share_is_read_once(tiny_model, monkeypatch):
    model, params = tiny_model
    rows, call = [], decode.prefill

    def noted(model, params, tokens_BT, *args):
        rows.append(len(tokens_BT))
        return call(model, params, tokens_BT, *args)

    monkeypatch.setattr(decode, "prefill", noted)
    prompt = [3, 1, 4, 1, 5]
    shared = tokens_of(model, params, [prompt] * 3, 4, SAMPLED)
    among = tokens_of(model, params, [prompt] * 3 + [[5]], 4, SAMPLED)
    assert rows == [1, 4]
    np.testing.assert_array_equal(shared, among[:3])


@pytest.mark.parametrize("count", [3, 2 * T])  # within the window, and beyond it
def test_a_row_ends_with_its_end_token_and_the_others_go_on(tiny_model, count):
    model, params = tiny_model
    prompts, seed = [[3, 1], [7], [2, 2, 2]], 5
    free = tokens_of(model, params, prompts, count, SAMPLED, seed)
    end = int(free[0, 1])
    drawn = [
        np.concatenate(each, axis=1)
        for each in zip(
            *generate_tokens(model, params, prompts, count, SAMPLED, seed, (end,)),
            strict=True,
        )
    ]
    tokens, log_probs = drawn
    for row in range(3):
        ends = np.flatnonzero(free[row] == end)
        length = ends[0] + 1 if len(ends) else tokens.shape[1]
        assert tokens[row, :length].tolist() == free[row, :length].tolist()
        assert (tokens[row, length:] == end).all()
        assert (log_probs[row, length:] == 0).all()
        assert (log_probs[row, :length] < 0).all()


def test_generation_stops_when_every_row_has_ended(tiny_model):
    model, params = tiny_model
    likeliest = tokens_of(model, params, [[3, 1]], 1)[0, 0]
    drawn = tokens_of(model, params, [[3, 1]] * 2, 100, end_tokens=(int(likeliest),))
    assert drawn.tolist() == [[likeliest]] * 2


@pytest.mark.parametrize(
    ("rows", "length", "devices"),
    [(24, 2, {3}), (20, 2, {2}), (15, 2, {1, 5}), (15, T, {5})],
)
def test_devices_that_share_the_rows_draw_what_one_draws(
    tiny_model, monkeypatch, rows, length, devices
):
    model, params = tiny_model
    prompts = [[row % V] * length for row in range(rows)]
    count = T + 3  # within the window and beyond it
    monkeypatch.setattr(decode, "data_parallel_mesh", lambda *args: None)
    alone = tokens_of(model, params, prompts, count, SAMPLED)
    monkeypatch.undo()
    shares, call = [], decode.decode

    def noted(*args):
        for array in jax.tree.leaves(args[-2]):
            shares.append(len(array) / len(array.addressable_data(0)))
        return call(*args)

    monkeypatch.setattr(decode, "decode", noted)
    np.testing.assert_array_equal(
        alone, tokens_of(model, params, prompts, count, SAMPLED)
    )
    assert set(shares) == devices  # of 8 those that divide the rows


def test_the_first_token_comes_alone(tiny_model):
    pieces = generate_tokens(*tiny_model, [[1, 2]], 5)
    assert [tokens.shape for tokens, _ in pieces] == [(1, 1), (1, 4)]


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
    model = build_model(config, "cpu")
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    programs = (decode.prefill, decode.decode)
    before = [program._cache_size() for program in programs]
    for length in range(1, 70):
        next(generate_tokens(model, params, [[1] * length], 1))
    after = [program._cache_size() for program in programs]
    # Of prompts up to 16, 32, 63 and 64 tokens; of drawing with the cache and without.
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 2]


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
