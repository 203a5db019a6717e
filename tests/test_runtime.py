import errno
import gc
import os
import platform
import signal
import sys
import time
import weakref
from contextlib import suppress

import jax
import pytest
from conftest import finish, start_script
from jax.errors import JaxRuntimeError

from jaxgpt import runtime
from jaxgpt.runtime import (
    deferred_interrupts,
    give_back_memory,
    plain_errors,
    replace_file,
)


@pytest.fixture(autouse=True)
def _a_test_outlives_the_script_it_ends(monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "new" / "file"
    replace_file(path, lambda aside: aside.write_text("whole"))

    def fail(aside):
        aside.write_text("ha")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, fail)
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


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


def wait_on(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def lose_an_interrupt():
    with suppress(KeyboardInterrupt):  # as a callback from C does
        signal.raise_signal(signal.SIGINT)
    wait_on(10)


def make_an_interrupt_another_error():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("while comparing") from error


@pytest.mark.parametrize("end", [lose_an_interrupt, make_an_interrupt_another_error])
def test_an_interrupt_ends_a_script_whatever_becomes_of_it(end, capsys):
    with pytest.raises(SystemExit) as left, plain_errors():
        end()
    assert left.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_thread_within_xla_does_not_abort_the_script_that_ends():
    compiling = """
import jax, signal, threading, time
from jaxgpt.runtime import plain_errors

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


def test_an_interrupt_that_is_lost_before_it_is_deferred_counts_once():
    with plain_errors():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with deferred_interrupts() as interrupt:
            wait_on(1.2)
            assert interrupt.reached()
    assert interrupt.signal == signal.SIGTERM


def test_what_an_interrupt_has_to_close_is_closed_in_peace():
    closed = False

    def close_slowly():
        nonlocal closed
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            wait_on(1.2)
            closed = True

    with pytest.raises(SystemExit), plain_errors():
        close_slowly()
    assert closed


def test_only_what_a_failed_save_leaves_behind_is_not_told_of():
    left_behind = """
import asyncio, tensorstore
from jaxgpt.runtime import start
class Broken:
    def __del__(self):
        raise ValueError("a defect")
start()
promise, written = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
written.add_done_callback(lambda _: loop.call_soon_threadsafe(print))
loop.close()
promise.set_result(None)
Broken()
"""
    _, err = finish(start_script("-c", left_behind))
    assert "ValueError: a defect" in err
    assert "Event loop is closed" not in err


def flags_after_start(flags):
    show = "from jaxgpt import runtime; runtime.start(); import os, jax"
    show += "; jax.devices(); print(os.environ.get('XLA_FLAGS'))"
    out, _ = finish(start_script("-c", show, XLA_FLAGS=flags))
    return out.split()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="set where measured")
def test_xlas_flags_are_the_users_where_they_name_them():
    theirs, ours = "--xla_cpu_ftz=true", list(map(runtime._as_flag, runtime._XLA_FLAGS))
    assert flags_after_start(theirs) == [theirs, *ours]
    one = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
    assert flags_after_start(one) == [one, *ours[1:]]


def test_float32_training_fuses_products_unless_the_user_says_how_to_multiply(
    monkeypatch,
):
    monkeypatch.setenv("XLA_FLAGS", runtime._as_flag(runtime._YNN_FLAG))
    assert "LIBRARY_FUSION_TYPE_DOT" in runtime.fused_products()[runtime._YNN_FLAG]
    monkeypatch.setenv("XLA_FLAGS", f"--{runtime._YNN_FLAG}=LIBRARY_FUSION_TYPE_REDUCE")
    assert runtime.fused_products() is None


def test_a_flag_that_xla_does_not_know_is_not_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(runtime, "_XLA_FLAGS", {"xla_cpu_no_such_flag": ("true",)})
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    runtime.start()
    assert os.environ["XLA_FLAGS"] == ""


def test_memory_that_is_given_back_is_that_of_cycles_too():
    class Node:
        pass

    node = Node()
    node.itself, seen = node, weakref.ref(node)
    gc.disable()
    try:
        del node
        assert seen() is not None
        give_back_memory()
        assert seen() is None
    finally:
        gc.enable()
