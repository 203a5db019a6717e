import ast
import gc
import inspect
import io
import os
import platform
import re
import sys
import weakref
from importlib import import_module
from unittest.mock import Mock

import jax
import pytest
from conftest import finish, start_script

import jaxgpt
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


def test_a_cache_is_only_looked_for_where_the_user_says(monkeypatch, tmp_path):
    home = Mock(side_effect=RuntimeError("no home"))
    monkeypatch.setattr(start.Path, "home", home)
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "own"))
    assert start.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("JAXGPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert start.cache_dir() == tmp_path / "jaxgpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(OSError, match="JAXGPT_CACHE"):
        start.cache_dir()
    monkeypatch.setattr(jax.config, "update", Mock(name="update"))
    start.start()  # no cache is needed
    names = [call.args[0] for call in jax.config.update.call_args_list]
    assert "jax_compilation_cache_dir" not in names
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="JAXGPT_CACHE"):
        start.cache_dir()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_stdout_is_utf_8_and_a_terminal_keeps_its_encoding(monkeypatch, is_terminal):
    stdout = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(stdout, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", None)  # closed
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    start.start()
    print("Да, \udcff", end="", flush=True)
    expected = b"??, ?" if is_terminal else "Да, ?".encode()
    assert stdout.buffer.getvalue() == expected


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


def test_jax_starts_silently_after_an_import_from_jaxgpt():
    script = """
import os
for name in list(os.environ):  # set in this process, by the same import
    if name.startswith(("TPU_", "JAX_PLATFORMS")):
        del os.environ[name]
import jax
from jaxgpt import Config
print(jax.devices(), os.environ.get("TPU_LOG_DIR"))
"""
    out, err = finish(start_script("-c", script))
    assert "disabled" in out or "Tpu" in out
    assert err == ""


def test_the_names_that_jaxgpt_imports_on_first_use_are_those_that_mypy_sees():
    (block,) = (
        n for n in ast.parse(inspect.getsource(jaxgpt)).body if type(n) is ast.If
    )
    seen = {name.name: line.module for line in block.body for name in line.names}
    assert seen == {n: f"jaxgpt.{module}" for n, module in jaxgpt._MODULES.items()}
    assert set(jaxgpt.__all__) <= set(dir(jaxgpt))
    for name, module in seen.items():
        assert getattr(jaxgpt, name) is getattr(import_module(module), name)


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


def test_a_long_compilation_is_told_with_the_programs_name(capsys):
    def slow_function(x):
        return x + 1

    def tell(event, seconds, **facts):
        start.tell_compilation(event, 1000 * seconds + 6, **facts)

    jax.monitoring.register_event_duration_secs_listener(tell)
    try:
        jax.jit(slow_function)(1.0)
    finally:
        jax.monitoring.unregister_event_duration_listener(tell)
    assert re.search(r"compiled slow_function in \d", capsys.readouterr().err)
    start.tell_compilation("/jax/core/compile/backend_compile_duration", 4.0)
    assert capsys.readouterr().err == ""
