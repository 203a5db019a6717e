import io
import sys
from types import SimpleNamespace

from jaxgpt import load_run, translate
from jaxgpt.generation import translation


def test_each_argument_or_line_gets_one_line(call, untrained, monkeypatch):
    texts = ["Puck tells a tale", "", "Lear"]
    run = load_run(untrained / "seq2seq")
    expected = translate(run, texts, beams=2, length_penalty=1)
    command = "jaxgpt", "translate", "--run-dir", untrained / "seq2seq"
    command += "--beams", 2, "--length-penalty", 1
    out = call(*command, *texts).out
    assert out.split("\n") == [*(" ".join(t.splitlines()) for t in expected), ""]
    for end in ("", "\n"):
        stdin = io.BytesIO(("\r\n".join(texts) + end).encode())
        stdin = SimpleNamespace(buffer=stdin, isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert call(*command).out == out


def test_a_newline_in_a_translation_becomes_a_space(call, untrained, monkeypatch):
    outputs = ["a\nb", "", "ç\r\nd\u2028e\n"]
    monkeypatch.setattr(translation, "translate", lambda *args, **options: outputs)
    command = "jaxgpt", "translate", "--run-dir", untrained / "seq2seq"
    assert call(*command, *"123").out == "a b\n\nç d e\n"
