import errno
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import finish, start_script
from jax.errors import JaxRuntimeError

from jaxgpt import exits, start
from jaxgpt.exits import deferred_interrupts, plain_errors, until_interrupt

NO_SPACE = OSError(errno.ENOSPC, "full", "FILE")


@pytest.fixture(autouse=True)
def _survive_exits(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("n=1 must be 2"), "n=1 must be 2"),
        (NO_SPACE, "space.*FILE"),
        (OSError(errno.EROFS, "read-only", "FILE"), "permission.*FILE"),
        (OSError("RESOURCE_EXHAUSTED: No space"), "error: RESOURCE_EXHAUSTED: No"),
        (MemoryError(), "memory.*batch"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: x"), "memory.*batch.*: x"),
    ],
)
def test_an_error_that_a_user_can_fix_is_one_line_and_status_1(capsys, error, message):
    with pytest.raises(SystemExit, match=r"^1$"), plain_errors():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a bug"), plain_errors():
        raise RuntimeError("a bug")


def test_sigterm_exits_with_its_number_and_its_handler_is_restored(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), plain_errors():
        os.kill(os.getpid(), signal.SIGTERM)
    assert capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    with deferred_interrupts() as pending:
        assert pending() == 0  # in the next script of this process


def test_an_interrupt_that_turned_into_another_error_is_still_an_interrupt(capsys):
    with pytest.raises(SystemExit, match="130"), plain_errors():  # noqa: PT012
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("while comparing")
    assert "comparing" not in capsys.readouterr().err


def test_a_thread_inside_xla_does_not_abort_a_script_that_exits():
    compiling = """
import jax, signal, threading, time
from jaxgpt.exits import plain_errors

def program(x):
    for _ in range(300):
        x = jax.numpy.sin(x @ x)
    return x

class SlowToDelete:
    def __del__(self):
        time.sleep(60)  # if Python shut down, the thread would return meanwhile

lowered = jax.jit(program).lower(jax.numpy.ones((64, 64)))
slow_to_delete, started = SlowToDelete(), threading.Event()
with plain_errors():
    thread = threading.Thread(target=lambda: (started.set(), lowered.compile()))
    thread.daemon = True
    thread.start()
    started.wait()
    signal.raise_signal(signal.SIGTERM)
"""
    finish(start_script("-c", compiling, JAX_ENABLE_COMPILATION_CACHE="0"), code=143)


class Interrupting:
    def __del__(self):  # Python ignores an exception here
        signal.raise_signal(signal.SIGINT)


def lose_interrupt():
    Interrupting()
    for _ in range(600):
        time.sleep(0.1)
    raise AssertionError("goes on")


def test_an_interrupt_that_a_library_loses_comes_again(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", start._report_unraisable)
    with pytest.raises(SystemExit, match="130"), plain_errors():
        lose_interrupt()
    with pytest.raises(SystemExit, match="143"), plain_errors():  # noqa: PT012
        assert until_interrupt(lose_interrupt) is None
        assert until_interrupt(lambda: [Interrupting(), 1].pop()) == 1
        time.sleep(5 * exits._AGAIN_SECONDS)  # it is of a call that has ended
        signal.raise_signal(signal.SIGTERM)


def test_a_lost_interrupt_lets_a_run_save(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", start._report_unraisable)
    # Later than this a second signal ends the script.
    monkeypatch.setattr(exits, "_AGAIN_SECONDS", 2 * exits._REPEAT_SECONDS)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with plain_errors():
        Interrupting()
        with deferred_interrupts() as pending:
            time.sleep(2 * exits._AGAIN_SECONDS)
            assert (pending(), ended) == (signal.SIGINT, [])


def test_ctrl_c_stops_one_call_and_is_ignored_between_calls():
    def interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("goes on")
        finally:
            signal.raise_signal(signal.SIGINT)
            unwound.append("the second one changes nothing")

    unwound = []
    with pytest.raises(SystemExit, match="143"), plain_errors():  # noqa: PT012
        for _ in range(2):
            assert until_interrupt(interrupted) is None
            assert unwound.pop()
            assert until_interrupt(lambda: 1) == 1
            signal.raise_signal(signal.SIGINT)
        until_interrupt(partial(signal.raise_signal, signal.SIGTERM))
    with pytest.raises(SystemExit, match="130"), plain_errors():
        interrupted()  # in the next script of this process


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_signals_of_terminals_and_clusters_let_a_run_save(name):
    if number := getattr(signal, name, None):  # Windows has none of them
        with plain_errors(), deferred_interrupts() as pending:
            signal.raise_signal(number)
            assert pending() == number


def test_a_failed_save_after_a_deferred_signal_is_an_error(capsys):
    with pytest.raises(SystemExit, match=r"^1$"), plain_errors(), deferred_interrupts():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        raise NO_SPACE
    assert "FILE" in capsys.readouterr().err


@pytest.mark.skipif(not exits._HANGUP, reason="Windows has no SIGHUP")
def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with plain_errors(), deferred_interrupts() as pending:
        signal.raise_signal(signal.SIGHUP)
        assert pending() == 0
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("second", "outcome"),
    [(10.4, nullcontext()), (10.6, pytest.raises(SystemExit, match="143"))],
)
def test_a_second_signal_within_half_a_second_is_a_repetition_of_the_first(
    monkeypatch, second, outcome
):
    coming = iter([(10.0, signal.SIGTERM), (second, signal.SIGTERM), (20.0, 0)])
    clock = SimpleNamespace(monotonic=lambda: clock.now)

    def recv(size):
        clock.now, number = next(coming)
        return bytes([number])

    monkeypatch.setattr(exits, "time", clock)
    receiver = SimpleNamespace(recv=recv, close=lambda: None)
    with outcome:
        exits._watch(receiver, [])


def test_a_second_signal_ends_a_script_that_is_too_busy_to_handle_the_first():
    busy = """
import hashlib
from jaxgpt.exits import deferred_interrupts, plain_errors, until_interrupt
with plain_errors(), deferred_interrupts():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour in C
"""
    script = start_script("-c", busy)
    assert script.stdout.readline() == "busy\n"
    for _ in range(1000):
        script.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            script.wait(timeout=0.1)
            break
    else:
        script.kill()
    finish(script, 143)


def test_a_signal_interrupts_a_native_call_in_a_thread():
    busy = """
import hashlib
from jaxgpt.exits import interruptible, plain_errors
with plain_errors():
    print("busy", flush=True)
    interruptible(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1))
"""
    script = start_script("-c", busy)
    assert script.stdout.readline() == "busy\n"
    script.send_signal(signal.SIGTERM)
    _, err = finish(script, 143)
    assert "interrupted" in err


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [
        ("pass", 0, ""),
        ("signal.raise_signal(2)", 130, ""),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("sys.exit(7)", 7, ""),
                ("sys.exit('told')", 1, "told"),
                ("raise RuntimeError('told')", 1, "RuntimeError: told"),
                ("raise KeyError('told')", 1, "KeyError: 'told'"),
            )
        ),
    ],
)
def test_a_compilation_in_the_background_does_not_spoil_an_exit(ending, code, told):
    # A thread that returns from XLA while Python shuts down would abort it.
    script = f"""
import signal, sys, threading
import jax
from jaxgpt.exits import in_background, plain_errors

def slow(x):
    for _ in range(100):
        x = jax.numpy.sin(x) @ x
    return x

def compile_slowly():
    lowered = jax.jit(slow).lower(jax.numpy.ones((50, 50)))
    compiling.set()
    lowered.compile()

compiling = threading.Event()
with plain_errors():
    compiled = in_background(compile_slowly)
    compiling.wait()
    {ending}
"""
    _, err = finish(start_script("-c", script), code)
    assert told in err
    assert ("Traceback" in err) == ("Error" in told)


@pytest.mark.processes
def test_interrupted_generation_exits_with_the_signals_number(smoke):
    many = ("--max-new-tokens", 10**6)
    script = start_script("generate.py", "--run-dir", smoke[0], *many)
    assert script.stdout.read(20)
    script.send_signal(signal.SIGINT)
    _, err = finish(script, 130)
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_text_that_cannot_be_written_to_stdout_is_an_error():
    full = """
import os
from jaxgpt.exits import plain_errors
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
with plain_errors():
    print("text")
"""
    _, err = finish(start_script("-c", full), 1)
    assert re.fullmatch("error: .*\n", err)
