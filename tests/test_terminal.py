import os
import re
import sys

from conftest import terminal_as_stderr

from jaxgpt.terminal import log_line, progress


def test_a_log_line_that_cannot_be_written_is_dropped(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as closed_pipe:
        monkeypatch.setattr(sys, "stderr", closed_pipe)
        log_line("step 1")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # so that it can be closed


def test_progress_is_a_bar_with_the_time_left_on_a_terminal(monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with progress("counting", 4, lambda: "1 apple, ") as advance:
        advance(1)
    assert "counting: 1 apple" in terminal.getvalue()
    assert re.search(r"25%.*-:--:--", terminal.getvalue())


def test_progress_is_a_line_now_and_then_elsewhere(monkeypatch, capsys):
    times = iter([0, 1, 36, 36, 40])
    monkeypatch.setattr("jaxgpt.terminal.time.monotonic", lambda: next(times))
    with progress("counting", 4, lambda: "2 apples, ") as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().err == "counting: 50%, 2 apples, 36 s left\n"
