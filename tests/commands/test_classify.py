import io
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from jaxgpt import classify, load_run
from jaxgpt.commands.texts import given_texts
from jaxgpt.exits import interruptible

TEXTS = ["Lear", "", "Puck tells a tale", " Romeo "]


@pytest.fixture
def set_stdin(monkeypatch):
    """Makes these bytes, or a binary stream, the standard input."""

    def set_stdin(source):
        stream = io.BytesIO(source) if isinstance(source, bytes) else source
        stdin = SimpleNamespace(buffer=stream, isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)

    return set_stdin


def test_each_argument_or_line_gets_its_likeliest_label(call, untrained, set_stdin):
    run = load_run(untrained / "classifier")
    expected = ""
    for probs_3 in classify(run, TEXTS):
        label = run.config.model.labels[probs_3.argmax()]
        expected += f"{label}\t{probs_3.max():.4f}\n"
    command = "jaxgpt", "classify", "--run-dir", untrained / "classifier"
    assert call(*command, *TEXTS).out == expected
    for end in ("", "\n"):
        set_stdin(("\r\n".join(TEXTS) + end).encode())
        assert call(*command).out == expected


def test_a_line_is_given_before_the_next_is_written(set_stdin):
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as stream, open(write_end, "wb", buffering=0) as typed:
        set_stdin(stream)
        texts = given_texts([], 16)
        for word in ("Lear", "", "Puck"):
            typed.write(f"{word}\n".encode())
            assert interruptible(partial(next, texts), seconds=60) == [word]
        typed.close()
        assert next(texts, None) is None


def test_lines_are_split_only_at_newlines_and_come_in_order(set_stdin):
    lines = [f"{n}\x0b\u2028" for n in range(50)]
    set_stdin("\n".join(lines).encode("utf-8-sig"))
    found = list(given_texts([], 16))
    assert [line for texts in found for line in texts] == lines
    assert max(map(len, found)) <= 16


def test_a_line_that_is_not_utf8_is_an_error_with_its_number(set_stdin):
    set_stdin(b"Lear\n\xe9\n")
    with pytest.raises(ValueError, match="line 2"):
        list(given_texts([], 16))


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream_is_an_error(set_stdin, monkeypatch, name):
    set_stdin(b"Lear\n")
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(ValueError, match=name):
        list(given_texts([], 16))
