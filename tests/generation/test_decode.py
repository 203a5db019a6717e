import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, init_model, logits_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import SamplingConfig
from jaxgpt.generation import decode
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.generation.sampling import scores

T, V = TINY.model.block_size, TINY.model.vocab_size
PROMPTS = st.lists(
    st.lists(st.integers(0, V - 1), min_size=1, max_size=T + 4), min_size=2, max_size=2
)
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=1.0, top_k=8)


def generated(model, *arguments, **options):
    """The tokens [B, N] of `generate_tokens`, and their log-probabilities."""
    drawn = zip(*generate_tokens(*model, *arguments, **options), strict=True)
    return [np.concatenate(each, axis=1) for each in drawn]


def tokens_of(model, prompts, count, sampling=GREEDY, **options):
    return generated(model, prompts, count, sampling, **options)[0]


@pytest.fixture
def calls_of(monkeypatch):
    """Records the arguments of the calls of a function of `decode`."""

    def record(name, note):
        recorded, call = [], getattr(decode, name)

        def noted(*arguments):
            recorded.append(note(*arguments))
            return call(*arguments)

        monkeypatch.setattr(decode, name, noted)
        return recorded

    return record


def lecture_logits(model, contexts):
    """The lecture's generate: a full pass over each context's last tokens."""
    windows = [context[-T:] for context in contexts]
    padded = np.array([window + [0] * (T - len(window)) for window in windows])
    last = np.array([len(window) - 1 for window in windows])
    return np.asarray(logits_of(*model, padded))[np.arange(len(windows)), last]


def assert_follows_the_lecture(model, prompts, drawn, sampling, seed):
    """Each token is the lecture's, wherever its score is clearly the largest."""
    count = drawn.shape[1]
    for row, prompt in enumerate(prompts):
        contexts = [prompt + drawn[row, :i].tolist() for i in range(count)]
        row_key = jax.random.fold_in(jax.random.key(seed), row)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(row_key, np.arange(count))
        logits = jnp.asarray(lecture_logits(model, contexts))
        row_scores = np.asarray(scores(logits, keys, sampling))
        gaps = row_scores.max(axis=1) - row_scores[np.arange(count), drawn[row]]
        assert (gaps < 1e-4).all()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@given(prompts=PROMPTS, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15, deadline=None)
def test_text_is_the_lectures_within_and_beyond_the_window(
    tiny_model, sampling, prompts, seed
):
    drawn = tokens_of(tiny_model, prompts, 2 * T + 2, sampling, seed=seed)
    assert drawn.shape == (2, 2 * T + 2)
    assert_follows_the_lecture(tiny_model, prompts, drawn, sampling, seed)


@pytest.mark.parametrize("cached", [True, False])
def test_rows_of_unequal_length_have_the_logits_of_each_alone(
    tiny_model, monkeypatch, cached
):
    model, params = tiny_model
    prompts, traced = [[3], [4, 1, 5, 9, 2], [7, 7, 7]], []

    def unlikely(logits_BV, keys_B, sampling):
        traced.append(logits_BV)
        return (logits_BV.argmax(-1) + 1) % V  # other tokens than the likeliest

    monkeypatch.setattr(decode, "sample", unlikely)

    @jax.jit
    def step(params, state):
        drawn = decode.decode_step(model, GREEDY, (), params, state)
        return *drawn, traced[-1]

    tokens_BT = np.array([prompt + [0] * (T - len(prompt)) for prompt in prompts])
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    keys_B, params = (
        jax.random.split(jax.random.key(0), 3),
        decode.unstack_layers(params),
    )
    state = decode.prefill(model, params, tokens_BT, length_B, keys_B, cached)
    steps = T + 1 - 5 if cached else 2 * T  # until the longest row leaves the window
    for _ in range(steps):
        state, (token_B, log_prob_B), logits_BV = step(params, state)
        expected_BV = lecture_logits(tiny_model, prompts)
        np.testing.assert_allclose(logits_BV, expected_BV, atol=2e-5)
        log_probs_BV = jax.nn.log_softmax(expected_BV)
        chosen_B = np.take_along_axis(log_probs_BV, token_B[:, None], 1)[:, 0]
        np.testing.assert_allclose(log_prob_B, chosen_B, atol=2e-5)
        prompts = [[*p, int(t)] for p, t in zip(prompts, token_B, strict=True)]
        for row, prompt in enumerate(prompts):
            count = int(state.length_B[row])
            assert state.tokens_BT[row, :count].tolist() == prompt[-T:]


def test_the_cache_is_used_within_the_window_and_not_beyond_it(tiny_model, calls_of):
    calls = calls_of("decode", lambda *args: (args[-2].caches is not None, args[-1]))
    drawn = generate_tokens(*tiny_model, [[1, 2], [3, 4, 5]], 2 * T)
    assert [tokens.shape[1] for tokens, _ in drawn] == [1, T - 3, T + 2]
    # The first token alone; the last that the cache serves makes T + 1.
    assert calls == [(True, 1), (True, T - 3), (False, 2 * T - (T - 2))]


def test_a_prompt_that_all_rows_share_is_processed_once(tiny_model, calls_of):
    rows = calls_of("prefill", lambda model, params, tokens_BT, *_: len(tokens_BT))
    prompt = [3, 1, 4, 1, 5]
    shared = tokens_of(tiny_model, [prompt] * 3, 4, SAMPLED)
    among = tokens_of(tiny_model, [prompt] * 3 + [[5]], 4, SAMPLED)
    assert rows == [1, 4]
    np.testing.assert_array_equal(shared, among[:3])


@pytest.mark.parametrize("count", [3, 2 * T])  # within the window, and beyond it
def test_a_row_ends_with_its_end_token_and_the_others_go_on(tiny_model, count):
    arguments = [[3, 1], [7], [2, 2, 2]], count, SAMPLED, 5
    free, _ = generated(tiny_model, *arguments)
    end = int(free[0, 1])
    tokens, log_probs = generated(tiny_model, *arguments, (end,))
    for row in range(3):
        ends = np.flatnonzero(free[row] == end)
        length = ends[0] + 1 if len(ends) else tokens.shape[1]
        assert tokens[row, :length].tolist() == free[row, :length].tolist()
        assert (tokens[row, length:] == end).all()
        assert (log_probs[row, length:] == 0).all()
        assert (log_probs[row, :length] < 0).all()


def test_generation_stops_when_every_row_has_ended(tiny_model):
    likeliest = int(tokens_of(tiny_model, [[3, 1]] * 2, 1)[0, 0])
    drawn = tokens_of(tiny_model, [[3, 1]] * 2, 100, end_tokens=(likeliest,))
    assert drawn.tolist() == [[likeliest]] * 2


@pytest.mark.parametrize(
    ("rows", "length", "devices"),
    [
        (20, 2, {2}),
        pytest.param(15, 2, {1, 5}, marks=pytest.mark.devices),
        pytest.param(24, 2, {3}, marks=pytest.mark.devices),
        pytest.param(15, T, {5}, marks=pytest.mark.devices),
    ],
)
def test_devices_that_share_the_rows_draw_what_one_draws(
    tiny_model, monkeypatch, calls_of, rows, length, devices
):
    prompts = [[row % V] * length for row in range(rows)]
    count = T + 3  # within the window and beyond it
    with monkeypatch.context() as patch:
        patch.setattr(decode, "data_parallel_mesh", lambda *args: None)
        alone = tokens_of(tiny_model, prompts, count, SAMPLED)

    def shares(*arguments):
        state = jax.tree.leaves(arguments[-2])
        return {len(array) // len(array.addressable_data(0)) for array in state}

    calls = calls_of("decode", shares)
    shared = tokens_of(tiny_model, prompts, count, SAMPLED)
    np.testing.assert_array_equal(shared, alone)
    assert set.union(*calls) == devices  # of 8 those that divide the rows


def test_models_without_a_cache_generate_too(bigram):
    prompts = [[3], [4, 1, 5]]
    drawn = tokens_of(bigram, prompts, 20, SAMPLED, seed=1)
    assert_follows_the_lecture(bigram, prompts, drawn, SAMPLED, 1)


def test_the_same_seed_gives_the_same_tokens_and_rows_differ(tiny_model):
    one, again, other = (
        tokens_of(tiny_model, [[3, 1]] * 3, 40, SAMPLED, seed=seed)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[0], one[1])


def test_a_row_does_not_depend_on_the_others_nor_on_how_many_tokens_follow(tiny_model):
    alone = tokens_of(tiny_model, [[3, 1]], 5, SAMPLED)
    among = tokens_of(tiny_model, [[3, 1], [7]], 40, SAMPLED)
    np.testing.assert_array_equal(alone[0], among[0, :5])


def test_prompts_of_all_lengths_share_a_program_per_power_of_two():
    model = init_model(block_size=64, n_layer=1)
    programs = (decode.prefill, decode.decode)
    before = [program._cache_size() for program in programs]
    for length in range(1, 70):
        next(generate_tokens(*model, [[1] * length], 1))
    after = [program._cache_size() for program in programs]
    # Of prompts up to 16, 32, 63 and 64 tokens; of drawing with the cache and without.
    assert [b - a for a, b in zip(before, after, strict=True)] == [4, 2]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, r"from 0 to 10: \[\]"),
        ([[11]], {}, r"from 0 to 10: \[11\]"),
        ([[-1]], {}, r"from 0 to 10: \[-1\]"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"sampling": SamplingConfig(top_k=12)}, "top_k=12 .*vocab_size=11"),
    ],
)
def test_what_cannot_be_generated_is_an_error(tiny_model, prompts, options, message):
    options = {"max_new_tokens": 1} | options
    with pytest.raises(ValueError, match=message):
        next(generate_tokens(*tiny_model, prompts, **options))
