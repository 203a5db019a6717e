import errno
import os
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import finish, start_script
from jax.errors import JaxRuntimeError

from jaxgpt import exits, start
from jaxgpt.exits import deferred_interrupts, plain_errors


@pytest.fixture(autouse=True)
def _a_test_outlives_the_script_it_ends(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("n=1 must be 2"), "error: n=1 must be 2"),
        (OSError(errno.ENOSPC, "full", "x"), "error: no room is left; make some"),
        (OSError(errno.EROFS, "read-only", "x"), "error: the permissions forbid it"),
        (OSError("RESOURCE_EXHAUSTED: No space"), "error: RESOURCE_EXHAUSTED: No"),
        (MemoryError(), "error: there is too little memory; make the batch"),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: x"), "error: there is too little memory"),
    ],
)
def test_what_a_user_can_mend_is_one_line_that_says_how(capsys, error, message):
    with pytest.raises(SystemExit) as left, plain_errors():
        raise error
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)


def test_what_is_no_fault_of_the_users_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a defect"), plain_errors():
        raise RuntimeError("a defect")


def test_sigterm_exits_with_its_number_and_leaves_the_handler_as_it_was(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, plain_errors():
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 143
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def make_an_interrupt_another_error():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("while comparing") from error


def test_an_interrupt_ends_a_script_whatever_becomes_of_it(capsys):
    with pytest.raises(SystemExit) as left, plain_errors():
        make_an_interrupt_another_error()
    assert left.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_thread_within_xla_does_not_abort_the_script_that_ends():
    compiling = """
import jax, signal, threading, time
from jaxgpt.exits import plain_errors

def program(x):
    for _ in range(300):
        x = jax.numpy.sin(x @ x)
    return x

class SlowToGo:
    def __del__(self):
        time.sleep(5)

slow_to_go = SlowToGo()  # so that the thread comes back while Python ends
with plain_errors():
    lowered = jax.jit(program).lower(jax.numpy.ones((64, 64)))
    threading.Thread(target=lowered.compile, daemon=True).start()
    time.sleep(0.1)
    signal.raise_signal(signal.SIGTERM)
"""
    script = start_script("-c", compiling, JAX_ENABLE_COMPILATION_CACHE="0")
    _, err = finish(script, code=143)
    assert err == "\ninterrupted\n"


def test_a_signal_that_waits_is_noted_and_raises_nothing():
    with plain_errors(), deferred_interrupts() as asked:
        assert asked() == 0
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM


def test_an_interrupt_that_the_garbage_collector_loses_is_noted(monkeypatch):
    class Interrupting:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "unraisablehook", start._report_unraisable)
    with plain_errors():
        Interrupting()  # Python goes on after an exception in __del__
        with deferred_interrupts() as asked:
            assert asked() == signal.SIGINT


def fail_to_save_after_a_signal():
    signal.raise_signal(signal.SIGTERM)
    raise OSError(errno.ENOSPC, "full", "x")


def test_a_save_that_fails_after_a_signal_is_an_error(capsys):
    with pytest.raises(SystemExit) as left, plain_errors(), deferred_interrupts():
        fail_to_save_after_a_signal()
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("error: no room is left")


@pytest.mark.skipif(not exits._HANGUP, reason="Windows has no SIGHUP")
def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with plain_errors(), deferred_interrupts() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked() == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("again", "outcome"),
    [(10.4, nullcontext()), (10.6, pytest.raises(SystemExit, match="143"))],
)
def test_a_signal_that_comes_again_within_half_a_second_is_the_same(
    monkeypatch, again, outcome
):
    coming = iter([(10.0, signal.SIGTERM), (again, signal.SIGTERM), (20.0, 0)])
    clock = SimpleNamespace(monotonic=lambda: clock.now)

    def recv(size):
        clock.now, number = next(coming)
        return bytes([number])

    monkeypatch.setattr(exits, "time", clock)
    arrivals = SimpleNamespace(recv=recv, close=lambda: None)
    with outcome:
        exits._watch(arrivals, [])


def test_a_second_signal_ends_a_script_that_could_not_handle_the_first():
    busy = """
import hashlib
from jaxgpt.exits import deferred_interrupts, plain_errors
with plain_errors(), deferred_interrupts():
    print("busy", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # takes C half an hour
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


def test_text_that_is_interrupted_ends_with_the_signals_number(smoke):
    script = start_script(
        "generate.py", "--run-dir", smoke[0], "--max-new-tokens", 10**6
    )
    assert script.stdout.read(20)
    script.send_signal(signal.SIGINT)
    _, err = finish(script, 130)
    assert err.endswith("\ninterrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="of Linux")
def test_text_that_stdout_cannot_take_is_an_error():
    full = """
import os
from jaxgpt.exits import plain_errors
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
with plain_errors():
    print("text")
"""
    _, err = finish(start_script("-c", full), 1)
    assert err.startswith("error: no room is left")
