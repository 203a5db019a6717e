import itertools

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import BPETokenizer, CharTokenizer, Run, generate
from jaxgpt.generation import stream
from jaxgpt.generation.stream import stream_text

OPTIONS = {"max_new_tokens": 40, "seed": 1}
BYTES = BPETokenizer.train(["a"], 257)  # every byte a token, and the end of a text


@pytest.fixture(scope="module")
def run(tiny_model):
    return Run(TINY, CharTokenizer("\nabcdefghij"), *tiny_model, 0)


@pytest.fixture(scope="module")
def stream_of(tiny_model):
    """Streams given tokens instead of the model's, cut at the given columns."""

    def stream_of(tokens_BN, cuts, yielded=None, **options):
        def generate_tokens(model, params, prompts, *options):
            assert options[-1] == (BYTES.end_of_text,)
            for start, stop in itertools.pairwise(cuts):
                if yielded is not None:
                    yielded.append(start)
                yield np.array(tokens_BN)[: len(prompts), start:stop], None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "generate_tokens", generate_tokens)
            return list(stream_text(Run(TINY, BYTES, *tiny_model, 0), "a", **options))

    return stream_of


def test_the_streamed_text_is_the_whole_text(run):
    parts = list(stream_text(run, "abc", num_samples=2, **OPTIONS))
    assert len(parts) > 2
    texts = generate(run, "abc", num_samples=2, **OPTIONS)
    assert texts == ["".join(part[row] for part in parts) for row in (0, 1)]
    assert [len(text) for text in texts] == [40, 40]
    assert texts[0] != texts[1]


def test_sampling_options_are_arguments_and_a_wrong_name_is_an_error(run):
    short = OPTIONS | {"max_new_tokens": 6}  # within the window: one program for each
    greedy = generate(run, "a", num_samples=2, temperature=0, **short)
    assert greedy[0] == greedy[1]
    for only_one in ({"top_k": 1}, {"top_p": 1e-9}):
        assert generate(run, "a", num_samples=2, **only_one, **short) == greedy
    assert generate(run, "a", temperature=0.8, **short) == generate(run, "a", **short)
    with pytest.raises(TypeError, match=r"generate\(\) .*'temprature'"):
        generate(run, "a", temprature=0)
    with pytest.raises(ValueError, match="temperature=-1"):
        generate(run, "a", temperature=-1)
    for wrong in ({"max_new_tokens": 2.5}, {"seed": 1.5}, {"num_samples": "2"}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            generate(run, "a", **wrong)
    with pytest.raises(TypeError, match="load_run"):
        generate("runs/x", "a")
    with pytest.raises(TypeError, match=r"prompt=\['a', 'b'\]"):
        generate(run, ["a", "b"])


def test_the_empty_prompt_stands_for_a_newline(run):
    assert generate(run, "", **OPTIONS) == generate(run, "\n", **OPTIONS)
    assert CharTokenizer("xyz").start == "x"


def test_a_sample_ends_before_the_stop_text_and_the_others_go_on(run):
    long = OPTIONS | {"max_new_tokens": 200}  # so that text goes on after the stop
    first, second = generate(run, "abc", num_samples=2, **long)
    stop = first[15:17]  # across two calls of TOKENS_PER_CALL
    assert first.count(stop) > 1
    stopped = generate(run, "abc", num_samples=2, stop=stop, **long)
    assert stopped == [first[: first.index(stop)], second.split(stop)[0]]


def test_a_sample_ends_where_its_document_does_and_the_others_go_on(stream_of):
    end = BYTES.end_of_text
    rows = [[*BYTES.encode("ab"), end, end, end, end]]
    rows += [BYTES.encode("aaaaaa"), BYTES.encode("cdefgh")]
    parts = stream_of(rows, [0, 2, 4, 6], num_samples=3)
    texts = ["".join(texts) for texts in zip(*parts, strict=True)]
    assert texts == ["ab", "aaaaaa", "cdefgh"]
    # One row by the end of its document, the other by the stop text: none goes on.
    yielded = []
    stream_of(rows, [0, 2, 4, 6], yielded, num_samples=2, stop="aa")
    assert yielded == [0, 2]


def test_text_that_only_begins_the_stop_text_is_not_lost(run):
    (text,) = generate(run, "abc", **OPTIONS)
    unmet = next(c for c in run.tokenizer.characters if c != text[-1]) * 3
    assert generate(run, "abc", stop=text[-1] + unmet, **OPTIONS) == [text]


@given(st.text("a é€🙂", max_size=12), st.lists(st.integers(1, 5)), st.integers(0, 3))
def test_streamed_text_never_has_half_a_character(stream_of, text, sizes, missing):
    ids = BYTES.encode(text)
    ids = ids[: max(len(ids) - missing, 0)]
    *parts, last = stream_of([ids], np.cumsum([0, *sizes, 60]))
    assert "\ufffd" not in "".join(part for (part,) in parts)
    assert "".join(part for (part,) in [*parts, last]) == BYTES.decode(ids)


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.text("ab", min_size=1, max_size=4),
)
def test_stop_text_is_found_however_the_text_is_cut(parts, stop):
    shown, held = "", ""
    for part in parts:
        text, held, found = stream._split_at_stop(held + part, stop)
        shown += text
        if found:
            break
    assert shown + held == "".join(parts).split(stop)[0]
    assert stop not in shown


@given(st.text(max_size=6))
def test_any_prompt_gives_text_or_an_error_that_names_the_character(run, prompt):
    unknown = [c for c in prompt if c not in run.tokenizer.characters]
    if unknown:
        with pytest.raises(ValueError, match="vocabulary") as error:
            generate(run, prompt, max_new_tokens=1)
        assert repr(unknown[0]) in str(error.value)
    else:
        assert len(generate(run, prompt, max_new_tokens=1)[0]) == 1
