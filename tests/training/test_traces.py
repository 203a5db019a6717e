import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, TINY, changed, finish, start_script, traces_folder

from jaxgpt.models import build_model
from jaxgpt.parallel import defaults
from jaxgpt.training import step, traces
from jaxgpt.training.sharding import make_mesh, read_batches

STEPS = 2
TOKENS = np.random.default_rng(0).integers(11, size=200).astype(np.uint16)
KINDS = {
    "one device": changed(TINY, mesh={"data": 1}),
    "a mesh of three axes": changed(TINY, mesh={"data": 2, "fsdp": 2, "tensor": 2}),
    "no clipping": changed(TINY, optimizer={"grad_clip": 0.0}),
    "a lecture's model": changed(TINY, model={"architecture": "layer-norm"}),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where this test keeps traces; a folder yet to be made."""
    folder = tmp_path / "cache" / "traces"
    monkeypatch.setattr(traces, "_folder", lambda mesh: folder)
    return folder


def mesh_of(config):
    return make_mesh(config, lambda line: None)


def train_kept(config):
    """Trains for STEPS steps, as train.py does; returns the state and the metrics."""
    mesh = mesh_of(config)
    state = traces.create_state(config, mesh)
    train_steps = traces.compile_train_steps(config, mesh, STEPS)
    batches = read_batches(TOKENS, range(STEPS), config, mesh)
    trained = train_steps(state, batches)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    return trained


def train_traced(config):
    """As `train_kept`, without traces that are kept."""
    model, mesh = build_model(config.model, "cpu"), mesh_of(config)
    state = step.create_state(model, config, mesh)
    batches = read_batches(TOKENS, range(STEPS), config, mesh)
    return step.compile_train_steps(model, config, mesh, STEPS)(state, batches)


def assert_alike(one, other):
    """Whether both have the same structure, placements and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_kept_traces_train_to_the_bit_as_new_ones(folder, monkeypatch, config):
    expected = train_traced(config)
    assert_alike(train_kept(config), expected)  # and keeps them
    for name in ("init_on", "jit_train_steps"):
        monkeypatch.setattr(step, name, lambda *args: pytest.fail("traced again"))
    assert_alike(train_kept(config), expected)


def keep(function):
    """Keeps a function's trace; returns what it gives for 3, and whether it is new."""
    made = []

    def trace():
        made.append(True)
        return jax.export.export(jax.jit(function))(0)

    exported = traces._kept(trace, mesh_of(TINY), ("a test",))
    return exported and int(exported.call(3)), bool(made)


@pytest.mark.parametrize("size", [0, 31, -1])
def test_a_trace_that_was_cut_short_is_made_again(folder, size):
    assert keep(lambda x: x + 1) == (4, True)
    assert keep(lambda x: x + 1) == (4, False)
    [path] = folder.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    assert keep(lambda x: x + 1) == (4, True)
    assert keep(lambda x: x + 1) == (4, False)


def test_where_nothing_can_be_kept_traces_are_made_all_the_same(folder):
    folder.parent.write_text("a file where the folder should be")
    assert keep(lambda x: x + 1) == keep(lambda x: x + 1) == (4, True)


def test_what_calls_back_to_python_is_not_kept(folder):
    def telling(x):
        jax.debug.print("{}", x)
        return x + 1

    assert keep(telling) == (None, True)
    assert not folder.exists()


def test_all_that_has_a_say_in_a_trace_changes_its_digest(tmp_path, monkeypatch):
    own = tmp_path / "own.py"  # a user's, that a model may call
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(__file__=str(own)))

    def digest(of=(TINY, 1), source="", precision=None):
        own.write_text(source)
        with jax.default_matmul_precision(precision):
            return traces._digest(of)

    digests = [
        digest(),
        digest(of=(TINY, 2)),
        digest(of=(changed(TINY, train={"seed": 4}), 1)),
        digest(source="edited"),
        digest(precision="bfloat16"),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digests[0]


def test_sources_are_the_packages_and_no_librarys(monkeypatch):
    no_file = SimpleNamespace(__file__="_classes.py")  # as torch.classes has it
    monkeypatch.setitem(sys.modules, "no_file", no_file)
    sources = traces._sources()
    assert {ROOT / "train.py", *(ROOT / "jaxgpt").rglob("*.py")} <= sources
    assert not any("site-packages" in path.parts for path in sources)
    assert all(path.is_file() for path in sources)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_enable_compilation_cache", False),
        ("jax_compilation_cache_dir", None),
        ("jax_compilation_cache_dir", "gs://bucket/xla"),
    ],
)
def test_nothing_is_kept_where_jax_keeps_no_programs_on_disk(setting, value):
    mesh, before = mesh_of(TINY), jax.config.values[setting]
    kept = traces_folder(mesh)
    assert kept == Path(jax.config.values["jax_compilation_cache_dir"]) / "traces"
    jax.config.update(setting, value)
    try:
        assert traces_folder(mesh) is None
    finally:
        jax.config.update(setting, before)


def test_several_processes_and_accelerators_keep_nothing(monkeypatch):
    assert traces_folder(mesh_of(TINY)) is not None
    with monkeypatch.context() as patch:
        patch.setattr(defaults, "platform_of", lambda mesh: "cuda")
        assert traces_folder(mesh_of(TINY)) is None
    monkeypatch.setattr(traces, "several_processes", lambda: True)
    assert traces_folder(mesh_of(TINY)) is None


def test_a_second_start_of_train_py_reads_what_the_first_has_kept(tmp_path, text_file):
    compiled = tmp_path / "xla"
    command = (
        f"lecture-bigram --overwrite --out-dir {tmp_path / 'run'} "
        f"--data.path {text_file} --train.max-steps 2 --train.eval-iters 1"
    )

    def start():
        cache = {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
        _, told = finish(start_script("train.py", *command.split(), **cache))
        kept = {
            path: path.stat().st_mtime_ns for path in (compiled / "traces").iterdir()
        }
        return re.findall("loss [0-9.]+", told), kept

    first, kept = start()
    assert len(kept) == 2  # the initial state, and a step
    assert start() == (first, kept)
