import gc
import os
import platform
import weakref

import jax
import pytest
from conftest import finish, start_script

from jaxgpt import start


def test_of_unraisable_errors_only_those_of_a_failed_save_are_hidden():
    script = """
import asyncio, tensorstore
from jaxgpt.start import start
class Broken:
    def __del__(self):
        raise ValueError("a bug")
start()
promise, written = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
written.add_done_callback(lambda _: loop.call_soon_threadsafe(print))
loop.close()
promise.set_result(None)
Broken()
"""
    _, err = finish(start_script("-c", script))
    assert "ValueError: a bug" in err
    assert "Event loop is closed" not in err


def flags_after_start(flags):
    script = "from jaxgpt import start; start.start(); import os, jax"
    script += "; jax.devices(); print(os.environ.get('XLA_FLAGS'))"
    out, _ = finish(start_script("-c", script, XLA_FLAGS=flags))
    return out.split()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="set on x86-64 only")
def test_xla_flags_of_the_user_take_precedence_and_others_are_added():
    theirs, ours = "--xla_cpu_ftz=true", start._XLA_FLAGS
    assert flags_after_start(theirs) == [theirs, *ours]
    one = f"--{start._YNN}=LIBRARY_FUSION_TYPE_REDUCE"
    assert flags_after_start(one) == [one, *ours[1:]]


def test_float32_training_fuses_matmuls_unless_the_user_sets_the_fusion_type(
    monkeypatch,
):
    monkeypatch.setenv("XLA_FLAGS", start._XLA_FLAGS[0])
    assert "LIBRARY_FUSION_TYPE_DOT" in start.float32_matmul_flags()[start._YNN]
    monkeypatch.setenv("XLA_FLAGS", f"--{start._YNN}=LIBRARY_FUSION_TYPE_REDUCE")
    assert start.float32_matmul_flags() is None


def test_a_flag_that_xla_does_not_know_is_not_set(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(start, "_XLA_FLAGS", ["--xla_cpu_no_such_flag=true"])
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    start.start()
    assert os.environ["XLA_FLAGS"] == ""


def test_release_memory_frees_reference_cycles():
    class Node:
        pass

    node = Node()
    node.itself, reference = node, weakref.ref(node)
    gc.disable()
    try:
        del node
        assert isinstance(reference(), Node)
        start.release_memory()
        assert reference() is None
    finally:
        gc.enable()
