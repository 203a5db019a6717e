import jax
import numpy as np
import pytest
from conftest import logits_of

from jaxgpt import classify, load_run
from jaxgpt.text.labelled import encode_texts

LONG = "Hamlet tells a tale of 7 winters. " * 4  # more than block_size
TEXTS = ["Lear", LONG, "", "Puck"]


@pytest.fixture(scope="module")
def run(untrained):
    return load_run(untrained / "classifier")


def test_probabilities_are_the_models_whatever_shares_a_batch(run):
    sequences = encode_texts(TEXTS, run.tokenizer, run.config.model.block_size)
    logits_N13 = [
        logits_of(run.model, run.params, sequences[row][None]) for row in range(4)
    ]
    alone_N3 = jax.nn.softmax(np.concatenate(logits_N13))
    assert np.ptp(alone_N3, axis=0).max() > 0.01  # texts differ
    probs_N3 = classify(run, TEXTS, batch_size=2)
    assert probs_N3.dtype == np.float32
    np.testing.assert_allclose(probs_N3, alone_N3, rtol=0, atol=2e-5)


def test_of_a_long_text_the_middle_does_not_count(run):
    log = []
    same = LONG[:60] + "Puck" + LONG[60:]
    probs_N3 = classify(run, [LONG, same, "Lear" + LONG], batch_size=2, log=log.append)
    assert np.array_equal(probs_N3[0], probs_N3[1])
    assert not np.allclose(probs_N3[0], probs_N3[2])
    assert len(log) == 1


def test_characters_that_the_vocabulary_lacks_are_left_out_which_is_told(run):
    log = []
    probs_N3 = classify(run, ["Lear", "Le日ar", "日"], log=log.append)
    np.testing.assert_array_equal(probs_N3, classify(run, ["Lear", "Lear", ""]))
    assert ["日" in line for line in log] == [True]


def test_no_text_has_no_probabilities(run):
    assert classify(run, []).shape == (0, 3)


def test_texts_may_come_from_a_generator(run):
    probs = classify(run, (text for text in TEXTS))
    assert np.array_equal(probs, classify(run, TEXTS))


@pytest.mark.parametrize("texts", ["Lear", [3], [b"Lear"], None, 5])
def test_texts_must_be_a_list_of_str(run, texts):
    with pytest.raises(TypeError, match="texts"):
        classify(run, texts)
