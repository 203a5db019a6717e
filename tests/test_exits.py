import errno
import gc
import os
import platform
import signal
import sys
import weakref

import jax
import pytest
from conftest import finish, start_script
from jax.errors import JaxRuntimeError

from jaxgpt import start
from jaxgpt.exits import deferred_interrupts, plain_errors
from jaxgpt.files import replace_file
from jaxgpt.start import give_back_memory


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


def make_an_interrupt_another_error():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ValueError("while comparing") from error


@pytest.mark.parametrize("end", [make_an_interrupt_another_error])
def test_an_interrupt_ends_a_script_whatever_becomes_of_it(end, capsys):
    with pytest.raises(SystemExit) as left, plain_errors():
        end()
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


def test_only_what_a_failed_save_leaves_behind_is_not_told_of():
    left_behind = """
import asyncio, tensorstore
from jaxgpt.start import start
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
    show = "from jaxgpt import start; start.start(); import os, jax"
    show += "; jax.devices(); print(os.environ.get('XLA_FLAGS'))"
    out, _ = finish(start_script("-c", show, XLA_FLAGS=flags))
    return out.split()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="set where measured")
def test_xlas_flags_are_the_users_where_they_name_them():
    theirs, ours = "--xla_cpu_ftz=true", list(map(start._as_flag, start._XLA_FLAGS))
    assert flags_after_start(theirs) == [theirs, *ours]
    one = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
    assert flags_after_start(one) == [one, *ours[1:]]


def test_float32_training_fuses_products_unless_the_user_says_how_to_multiply(
    monkeypatch,
):
    monkeypatch.setenv("XLA_FLAGS", start._as_flag(start._YNN_FLAG))
    assert "LIBRARY_FUSION_TYPE_DOT" in start.fused_products()[start._YNN_FLAG]
    monkeypatch.setenv("XLA_FLAGS", f"--{start._YNN_FLAG}=LIBRARY_FUSION_TYPE_REDUCE")
    assert start.fused_products() is None


def test_a_flag_that_xla_does_not_know_is_not_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(start, "_XLA_FLAGS", {"xla_cpu_no_such_flag": ("true",)})
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    start.start()
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
