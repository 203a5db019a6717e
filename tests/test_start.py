import gc
import os
import platform
import weakref

import jax
import pytest
from conftest import finish, start_script

from jaxgpt import start


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
    theirs, ours = "--xla_cpu_ftz=true", start._XLA_FLAGS
    assert flags_after_start(theirs) == [theirs, *ours]
    one = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE"
    assert flags_after_start(one) == [one, *ours[1:]]


def test_float32_training_fuses_products_unless_the_user_says_how_to_multiply(
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


def test_memory_that_is_given_back_is_that_of_cycles_too():
    class Node:
        pass

    node = Node()
    node.itself, seen = node, weakref.ref(node)
    gc.disable()
    try:
        del node
        assert seen() is not None
        start.release_memory()
        assert seen() is None
    finally:
        gc.enable()
