import pytest

from jaxgpt import load_run, translate
from jaxgpt.generation.beam import beam_search
from jaxgpt.text.pairs import encode_sources

TEXTS = ["Puck tells a tale", "", "Lear", " \n", "of 7 winters.", "Hamlet"]


@pytest.fixture(scope="module")
def run(untrained):
    return load_run(untrained / "seq2seq")


def test_each_text_gets_its_translation_in_order_and_a_blank_one_an_empty(run):
    end, block_size = run.tokenizer.end_of_text, run.config.model.block_size
    found = translate(run, TEXTS, beams=2, length_penalty=1, batch_size=4)
    sources = encode_sources([t for t in TEXTS if t.strip()], run.tokenizer, block_size)
    outputs = beam_search(
        run.model, run.params, sources, end, beams=2, length_penalty=1, batch_size=4
    )
    expected = [run.tokenizer.decode(tokens[tokens != end]) for tokens, *_ in outputs]
    assert [text for text in found if text] == expected
    assert len(set(expected)) > 1
    assert [bool(text) for text in found] == [bool(text.strip()) for text in TEXTS]
    assert translate(run, []) == []


def test_a_long_text_is_cut_which_is_told(run):
    log, long = [], "Hamlet tells a tale of 7 winters. " * 4
    whole, cut = translate(
        run, [long, long[: run.config.model.block_size]], log=log.append
    )
    assert whole == cut
    assert len(log) == 1


@pytest.mark.parametrize("wrong", [{"beams": 1.5}, {"length_penalty": "a"}])
def test_numbers_of_another_type_are_named(run, wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        translate(run, ["Lear"], **wrong)


def test_characters_that_the_vocabulary_lacks_are_left_out_which_is_told(run):
    log = []
    found = translate(run, ["Lear", "Le日ar", "日"], beams=1, log=log.append)
    assert found[0] == found[1]
    assert ["日" in line for line in log] == [True]


@pytest.mark.parametrize("texts", ["Lear", [3], [b"Lear"]])
def test_texts_must_be_a_list_of_str(run, texts):
    with pytest.raises(TypeError, match="texts"):
        translate(run, texts)


def test_only_an_encoder_decoder_translates(untrained):
    with pytest.raises(ValueError, match=r"generate\.py"):
        translate(load_run(untrained / "gpt"), ["Lear"])
