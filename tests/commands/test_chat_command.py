import io
import os
import stat
import subprocess
import sys
import threading
from select import select
from types import SimpleNamespace

import pytest
from conftest import ROOT

from jaxgpt import chat as ask
from jaxgpt import exits, load_run
from jaxgpt.commands import chat, texts
from jaxgpt.text.conversations import read_conversations

OPTIONS = {"max_new_tokens": 12, "temperature": 1.0}
GREEDY = {"temperature": 0}
LEFT, UP, BACKSPACE, CTRL_C, CTRL_D = "\x1b[D", "\x1b[A", "\x7f", "\x03", "\x04"
FLAGS = "--max-new-tokens", 12, "--temperature", 1.0


@pytest.fixture
def talk(call, untrained, monkeypatch):
    """Writes lines to the command's stdin; returns stdout's lines, and stderr."""

    def talk(*lines, flags=FLAGS):
        stdin = io.BytesIO("\n".join(lines).encode())
        stdin = SimpleNamespace(buffer=stdin, isatty=lambda: False)
        monkeypatch.setattr(sys, "stdin", stdin)
        out, err = call("jaxgpt", "chat", "--run-dir", untrained / "chat", *flags)
        assert out.count("\n") == len(lines)
        return out.split("\n")[:-1], err

    return talk


@pytest.fixture
def scripted(monkeypatch):
    """Replaces the model: answers are given, and an exception is raised."""

    def scripted(*answers):
        seen, texts = [], iter(answers)

        def answer(run, messages, max_new_tokens, sampling, seed, log):
            seen.append([each.content for each in messages])
            for part in next(texts):
                if not isinstance(part, str):
                    raise part
                yield part

        monkeypatch.setattr(chat, "answer", answer)
        return seen

    return scripted


@pytest.fixture
def type_lines(call, untrained, monkeypatch):
    """Types lines at the command's prompt, or raises what the terminal would."""

    def type_lines(*lines):
        typed = iter([*lines, EOFError()])

        def typed_line(prompt):
            line = next(typed)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", typed_line)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(texts, "_line_history", lambda method: None)
        monkeypatch.setattr(exits._interrupts, "stops", None)  # it stays set
        return call("jaxgpt", "chat", "--run-dir", untrained / "chat", *FLAGS)

    return type_lines


def said(*texts):
    """Messages of user and assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


def test_each_line_of_stdin_gets_the_answer_to_the_conversation_so_far(talk, untrained):
    run = load_run(untrained / "chat")
    system = [{"role": "system", "content": "Lear"}]
    answers = []
    for messages in ("Puck",), ("Puck", 0, "a tale"), ("Puck", 0, "a tale"), ("Puck",):
        texts = [answers[each] if each == 0 else each for each in messages]
        seed = 1337 + len(answers)
        answers.append(ask(run, [*system, *said(*texts)], seed=seed, **OPTIONS))
    first, second, again, third = (" ".join(each.splitlines()) for each in answers)
    assert len({first, second, again, third}) == 4
    flags = "--system", "Lear", *FLAGS
    out, _ = talk("Puck", "", "a tale", "/retry", "/reset", "Puck", flags=flags)
    assert out == [first, "", second, again, "", third]


def test_commands_change_what_the_model_sees_and_are_not_sent(talk, scripted):
    seen = scripted("ab", ["", "c\nd\r\ne\n"], "f", "g", "h")
    out, err = talk("Puck", "/system Lear", "Hamlet", "/retry", "/tale x", "/reset x",
                    "/retry x", "Lear", "/system", " /tale x", "/help")  # fmt: skip
    assert out == ["ab", "", "c d e", "f", "", "", "", "g", "", "h", ""]
    assert seen == [["Puck"], ["Lear", "Hamlet"], ["Lear", "Hamlet"],
                    ["Lear", "Hamlet", "f", "Lear"], ["/tale x"]]  # fmt: skip
    for name in ("no command /tale", "/reset", "/system", "/retry", "/save"):
        assert name in err


def test_a_saved_conversation_is_read_again(talk, scripted, tmp_path):
    scripted("no", "yes, \u2028 2", "1")
    path = tmp_path / "a b.jsonl"
    _, err = talk(
        *("/save", f"/save {path}", "Puck", "Lear é", f"/save {path}", "/save"),
        *("/system Lear", f"/save {path}", "tale", f"/save {path}"),
        *(f"/save {tmp_path}", "/save /dev/full", f"/save {path}"),
    )
    assert str(tmp_path) in err.split("not saved: ")[1]
    assert err.count("not saved: ") == 2
    first, *second = read_conversations(path)
    assert [each.content for each in first] == [
        "Puck",
        "no",
        "Lear é",
        "yes, \u2028 2",
    ]
    assert second == [second[0]] * 2
    assert [tuple(each) for each in second[0]] == [
        ("system", "Lear"), ("user", "tale"), ("assistant", "1")
    ]  # fmt: skip


def test_what_has_no_text_is_neither_sent_nor_kept(talk, scripted):
    seen = scripted("a", "", [" ", "\n"], "", "b")
    out, err = talk("Puck", "", "é é", "Lear", "Hamlet", "/retry", "tale")
    assert out[:4] == ["a", "", "", ""]
    assert seen[1:] == [
        ["Puck", "a", "Lear"], ["Puck", "a", "Hamlet"], ["Puck"], ["Puck", "a", "tale"]
    ]  # fmt: skip
    assert err.count("the answer is empty") == 3
    assert "nothing is left" in err
    seen = scripted("a")
    talk("/system é", "Puck")
    assert seen == [["Puck"]]


def test_what_the_user_should_know_goes_to_stderr(talk):
    flags = ("--max-new-tokens", 80, "--temperature", 1, "--top-p", 0.9)
    long = "Hamlet tells a tale of winters"
    out, err = talk("é tale", *[long] * 4, "/reset", *[long] * 4, flags=flags)
    assert repr("é") in err
    assert err.count("the oldest messages are outside the window") == 2
    assert all(len(line) < 90 for line in out)


def test_an_error_or_an_interrupt_ends_an_answer_but_not_the_conversation(
    type_lines, scripted
):
    stop, error = KeyboardInterrupt(), RuntimeError("RESOURCE")
    seen = scripted("ab", ["c", "d", stop], ["e", error], [stop], [error], "f")
    out, err = type_lines("1", "2", stop, "", "3", "/retry", "4", "5")
    assert out == "ab\ncd\n\n\ne\n\n\nf\n\n"
    assert err.count("RESOURCE") == 2
    assert seen[-1] == ["1", "ab", "2", "cd", "3", "e", "5"]


def test_an_error_ends_the_command_if_nobody_types(talk, scripted):
    scripted("a", [ValueError("tale")])
    with pytest.raises(ValueError, match="tale"):
        talk("1", "2", "3")


@pytest.mark.processes
def test_a_terminal_has_line_editing_a_history_and_interrupts(untrained, tmp_path):
    prefix = ask(load_run(untrained / "chat"), said("tale"), **OPTIONS | GREEDY)
    wait = "import os, pty, sys; status = pty.spawn(sys.argv[1:]);"
    wait += "sys.exit(os.waitstatus_to_exitcode(status))"
    command = [sys.executable, "-c", wait, sys.executable, "-m", "jaxgpt", "chat"]
    command += ["--run-dir", untrained / "chat", "--temperature", "0"]
    command += ["--max-new-tokens", str(10**9)]  # so that only Ctrl-C ends an answer
    files = {"JAXGPT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def dialog(*steps):
        """Types, and waits for what the terminal then shows, before it goes on."""
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            env=os.environ | files | {"TERM": "xterm"},
        ) as process:
            watchdog = threading.Timer(600, process.kill)
            watchdog.start()
            output = process.stdout
            for typed, awaited in steps:
                process.stdin.write(typed.encode())
                process.stdin.flush()
                shown = ""
                while awaited not in shown:
                    # readline hears a signal that comes just before it waits for a
                    # key only with the next one.
                    while typed == CTRL_C and not any(select([output], [], [], 10)):
                        process.stdin.write(typed.encode())
                        process.stdin.flush()
                    new = os.read(output.fileno(), 4096).decode()
                    assert new, (typed, shown)
                    shown += new
            process.stdin.write(CTRL_D.encode())
            process.stdin.flush()
            assert process.wait() == 0
            watchdog.cancel()

    dialog(
        ("", "> "),
        (f"taXle{LEFT}{LEFT}{BACKSPACE}\n", prefix),
        (CTRL_C, "> "),
        ("/save one\n", "saved in one\r\n\r\n> "),
        ("/save no", "/save no"),
        (CTRL_C, "> "),
        (f"{UP}2\n", "saved in one2\r\n\r\n> "),
    )
    dialog(("", "> "), (UP, "/save one2"), (CTRL_C, "> "))
    (conversation,) = read_conversations(tmp_path / "one2")
    assert [each.role for each in conversation] == ["user", "assistant"]
    assert conversation[0].content == "tale"
    assert conversation[1].content.startswith(prefix)
    assert stat.S_IMODE((tmp_path / "cache/chat_history").stat().st_mode) == 0o600
