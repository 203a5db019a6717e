import dataclasses
import itertools

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import BPETokenizer, CharTokenizer, Run, SamplingConfig, generate
from jaxgpt.generation import stream
from jaxgpt.generation.stream import stream_text

OPTIONS = {"max_new_tokens": 40, "seed": 1}


@pytest.fixture(scope="module")
def run(tiny_model):
    model, params = tiny_model
    return Run(TINY, CharTokenizer("\nabcdefghij"), model, params, 0)


def test_streamed_pieces_are_the_whole_text(run):
    pieces = list(stream_text(run, "abc", num_samples=2, **OPTIONS))
    assert len(pieces) > 2
    texts = generate(run, "abc", num_samples=2, **OPTIONS)
    assert texts == ["".join(piece[row] for piece in pieces) for row in (0, 1)]
    assert [len(text) for text in texts] == [40, 40]
    assert texts[0] != texts[1]


def test_the_empty_prompt_stands_for_a_newline(run):
    assert generate(run, "", **OPTIONS) == generate(run, "\n", **OPTIONS)
    assert CharTokenizer("xyz").start == "x"


def test_a_sample_ends_before_the_stop_text_and_the_others_go_on(run):
    long = OPTIONS | {"max_new_tokens": 200}  # so that text goes on after the stop
    first, second = generate(run, "abc", num_samples=2, **long)
    stop = first[15:17]  # across two calls of TOKENS_PER_CALL
    assert first.count(stop) > 1
    stopped = generate(run, "abc", num_samples=2, stop=stop, **long)
    assert stopped[0] == first[: first.index(stop)]
    assert stopped[1] == second.split(stop)[0]


def test_a_sample_ends_where_its_document_does_and_the_others_go_on(tiny_model):
    tokenizer = BPETokenizer.train(["a"], 257)
    end = tokenizer.end_of_text
    rows = [[*tokenizer.encode("ab"), end, end, end, end]]
    rows += [tokenizer.encode("aaaaaa"), tokenizer.encode("cdefgh")]
    asked, taken = [], []

    def pieces(*arguments):
        asked.append(arguments[-1])
        for start in range(0, 6, 2):
            taken.append(start)
            yield np.array(rows)[: len(arguments[2]), start : start + 2], None

    bytes_run = Run(TINY, tokenizer, *tiny_model, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "generate_tokens", pieces)
        texts = generate(bytes_run, "a", num_samples=3)
        assert texts == ["ab", "aaaaaa", "cdefgh"]
        assert asked == [(end,)]
        taken.clear()
        # One row by the end of its document, the other by the stop text: none goes on.
        assert generate(bytes_run, "a", num_samples=2, stop="aa") == ["ab", ""]
        assert taken == [0, 2]


def test_text_that_only_begins_the_stop_is_not_lost(run):
    (text,) = generate(run, "abc", **OPTIONS)
    unmet = next(c for c in run.tokenizer.characters if c != text[-1]) * 3
    assert generate(run, "abc", stop=text[-1] + unmet, **OPTIONS) == [text]


BYTES = BPETokenizer.train(["a"], 257)  # every byte a token


@given(st.text("a é€🙂", max_size=12), st.lists(st.integers(1, 5)), st.integers(0, 3))
def test_streamed_pieces_never_hold_half_a_character(tiny_model, text, sizes, missing):
    ids = BYTES.encode(text)
    ids = ids[: max(len(ids) - missing, 0)]
    cuts = np.cumsum([0, *sizes, 60])

    def pieces(*args):
        for start, stop in itertools.pairwise(cuts):
            yield ids[None, start:stop], None

    bytes_run = Run(TINY, BYTES, *tiny_model, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "generate_tokens", pieces)
        *drawn, last = (piece[0] for piece in stream_text(bytes_run, "a"))
    assert "\ufffd" not in "".join(drawn)
    assert "".join([*drawn, last]) == BYTES.decode(ids)


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.text("ab", min_size=1, max_size=4),
)
def test_stop_text_is_found_however_the_text_is_cut(pieces, stop):
    shown, held = "", ""
    for piece in pieces:
        text, held, found = stream._split_at_stop(held + piece, stop)
        shown += text
        if found:
            break
    assert shown + held == "".join(pieces).split(stop)[0]
    assert stop not in shown


@given(st.text(max_size=6))
def test_any_prompt_gives_text_or_names_the_character(run, prompt):
    if set(prompt) <= set(run.tokenizer.characters):
        assert len(generate(run, prompt, max_new_tokens=1)[0]) == 1
    else:
        with pytest.raises(ValueError, match="is not in the vocabulary"):
            generate(run, prompt, max_new_tokens=1)


def test_a_run_without_tokenizer_says_what_is_missing(run):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        generate(dataclasses.replace(run, tokenizer=None), "abc")


def test_num_samples_below_1_is_an_error(run):
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        generate(run, "abc", num_samples=0)


def test_greedy_samples_are_alike(run):
    greedy = SamplingConfig(temperature=0.0)
    one, other = generate(run, "abc", num_samples=2, sampling=greedy, max_new_tokens=20)
    assert one == other
