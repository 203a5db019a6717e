import itertools
from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh_of, random_params

from jaxgpt.config import Config, DataConfig, MeshConfig, Seq2SeqConfig
from jaxgpt.generation.beam import beam_search
from jaxgpt.models import build_model
from jaxgpt.text.examples import Sequences

T, V, END = 16, 4, 2
SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": T, "vocab_size": V}
SOURCES = [[END], [3, 3, 1, 0, 1, 3, 0, 0, END], [0] * (T - 1) + [END]]
SOURCES += [[n // 4, n % 4, n // 4, END] for n in range(13)]


@pytest.fixture(scope="module")
def model():
    """An encoder-decoder of uncertain next tokens, and its parameters."""
    model = build_model(Seq2SeqConfig(**SHAPE), "cpu")
    return model, random_params(model, mean=0.1, std=0.8)


def search(model, sources=SOURCES, beams=3, length_penalty=1, **options):
    texts = Sequences(np.concatenate(sources), np.cumsum([0, *map(len, sources)]))
    options |= {"beams": beams, "length_penalty": length_penalty}
    return beam_search(*model, texts, END, **options)


@partial(jax.jit, static_argnums=0)
def teacher_forced(model, params, inputs_BT, source):
    return jax.nn.log_softmax(model.apply({"params": params}, inputs_BT, **source))


def next_log_probs(model, sources, outputs):
    """Log-probabilities of each token given those before it, f32 [B, T, V]."""
    (network, params), lengths = model, np.array([len(each) for each in sources])
    source_BS, outputs_BT = (
        np.array([[*each, *[END] * (T - len(each))] for each in rows])
        for rows in (sources, outputs)
    )
    inputs = np.roll(outputs_BT, 1, axis=1)
    inputs[:, 0] = END
    options = {"source_BS": source_BS, "lengths_B": lengths}
    return np.asarray(teacher_forced(network, params, inputs, options))


def log_probs(model, sources, outputs):
    """The log-probability of each output, without a decoder's cache or loop."""
    nexts = next_log_probs(model, sources, outputs)
    return np.array(
        [row[np.arange(len(o)), o].sum() for row, o in zip(nexts, outputs, strict=True)]
    )


def score(log_prob, length, length_penalty):
    return log_prob / ((5 + length) / 6) ** length_penalty


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one[1:], other[1:], atol=2e-5)


def test_one_beam_is_greedy_decoding(model):
    outputs = [[] for _ in SOURCES]
    for position in range(T):
        chosen = next_log_probs(model, SOURCES, outputs)[:, position].argmax(axis=-1)
        for output, token in zip(outputs, chosen.tolist(), strict=True):
            if END not in output:
                output.append(token)
    found = [each.tokens.tolist() for each in search(model, beams=1)]
    assert found == outputs
    assert len(set(map(len, outputs))) > 1


@pytest.mark.parametrize("length_penalty", [0, 2])
def test_enough_beams_find_the_best_of_all_outputs(model, length_penalty):
    letters, most = [id_ for id_ in range(V) if id_ != END], 4
    texts = [itertools.product(letters, repeat=n) for n in range(most)]
    outputs = [[*text, END] for text in itertools.chain(*texts)]
    options = {"beams": len(letters) ** most + len(outputs), "max_new_tokens": most}
    found = search(model, length_penalty=length_penalty, **options)
    assert len({len(each.tokens) for each in found}) > 1
    for source, (tokens, _, best) in zip(SOURCES, found, strict=True):
        each = log_probs(model, [source] * len(outputs), outputs)
        scores = score(each, np.array(list(map(len, outputs))), length_penalty)
        assert tokens.tolist() == outputs[scores.argmax()]
        np.testing.assert_allclose(best, scores.max(), atol=2e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_log_probability_of_an_output_is_the_models(model, beams):
    found = search(model, beams=beams)
    outputs = [each.tokens for each in found]
    expected = log_probs(model, SOURCES, outputs)
    np.testing.assert_allclose([each.log_prob for each in found], expected, atol=2e-5)
    expected = [score(p, len(o), 1) for p, o in zip(expected, outputs, strict=True)]
    np.testing.assert_allclose([each.score for each in found], expected, atol=2e-5)


def test_an_output_does_not_depend_on_the_other_sources_nor_on_padding(model):
    found = search(model)
    for batch_size in (1, 5):
        alone = search(model, SOURCES[::-1], batch_size=batch_size)
        assert_same(found, alone[::-1])


def test_devices_that_share_the_sources_find_what_one_finds(model):
    sharded = Config(
        Seq2SeqConfig(**SHAPE), DataConfig(batch_size=8), mesh=MeshConfig(4)
    )
    found = search(model, batch_size=8, mesh=mesh_of(sharded))
    assert_same(found, search(model))


def test_outputs_that_are_cut_are_only_for_sources_without_others(model):
    found = search(model, max_new_tokens=2, beams=V)
    assert all(len(each.tokens) <= 2 and END in each.tokens for each in found)
    assert any(END not in each.tokens for each in search(model, beams=1))


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([[]], {}, "1 to 16 token ids"),
        ([[0] * (T + 1)], {}, "1 to 16 token ids"),
        ([[V]], {}, "from 0 to 3"),
        ([[0]], {"beams": 0}, "beams=0"),
        ([[0]], {"batch_size": 0}, "batch_size=0"),
        ([[0]], {"length_penalty": -1.0}, "length_penalty=-1"),
        ([[0]], {"length_penalty": float("nan")}, "length_penalty=nan"),
        ([[0]], {"max_new_tokens": T + 1}, "max_new_tokens=17"),
    ],
)
def test_what_cannot_be_searched_is_an_error(model, sources, options, message):
    with pytest.raises(ValueError, match=message):
        search(model, sources, **options)


def test_a_hidden_source_is_not_read(model):
    network = build_model(Seq2SeqConfig(**SHAPE, hide_source=True), "cpu")
    found = search((network, model[1]))
    assert_same(found, found[:1] * len(SOURCES))
    outputs = [each.tokens for each in found]
    expected = log_probs((network, model[1]), SOURCES, outputs)
    np.testing.assert_allclose([each.log_prob for each in found], expected, atol=2e-5)
