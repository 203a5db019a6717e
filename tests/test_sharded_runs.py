"""Runs whose parameters are spread over 8 devices, in everything that reads a run."""

import json

import jax
import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, changed

import train
from jaxgpt import load_run
from jaxgpt.run import find_checkpoint, load_config
from jaxgpt.training.monitor import read_rows

ONE = {"data": 1}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tales.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run_on(text, tmp_path_factory):
    """Trains for 4 steps on a mesh of this shape; returns the run's directory."""

    def run_on(**mesh):
        config = changed(
            TINY,
            model={"vocab_size": None},
            data={"path": (str(text),)},
            train={"max_steps": 4, "log_interval": 1},
            mesh=mesh,
        )
        run_dir = tmp_path_factory.mktemp("sharded") / "run"
        train.train(config, run_dir, resume=False, overwrite=False)
        return run_dir

    return run_on


@pytest.fixture(scope="module")
def cube(run_on):
    return run_on(**CUBE)


def losses(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row.get("loss", row.get("val_loss")) for row in rows]


@pytest.mark.parametrize(
    ("before", "after"),
    [({"fsdp": 8}, CUBE), (CUBE, ONE), (ONE, {"fsdp": 2, "tensor": 2})],
)
def test_a_run_resumes_on_another_mesh_and_goes_on_alike(run_on, call, before, after):
    expected, moved = run_on(**ONE), run_on(**before)
    for run_dir, mesh in ((expected, ONE), (moved, {"data": -1} | after)):
        flags = [x for axis, n in mesh.items() for x in (f"--mesh.{axis}", n)]
        resume = ("--out-dir", run_dir, "--resume", "--train.max-steps", 8)
        call("train.py", *resume, *flags)
    assert load_run(moved, "latest").step == 8
    assert len(losses(expected)) > 10
    np.testing.assert_allclose(losses(moved), losses(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mesh", [("--mesh.tensor", 2), ("--mesh.fsdp", -1)])
def test_devices_that_share_a_model_write_what_one_writes(cube, call, mesh):
    options = ("--run-dir", cube, "--prompt", "Lear", "--max-new-tokens", 20)
    samples = ("--num-samples", 2, "--temperature", 0.5)
    alone, _ = call("generate.py", *options, *samples)
    shared, _ = call("generate.py", *options, *samples, *mesh)
    assert shared == alone
    assert len(alone) > 48


def test_a_model_is_loaded_in_parts_where_devices_share_it(cube, call, monkeypatch):
    held = []

    def spy(run, *args, **options):
        kernel = run.params["h"]["mlp"]["c_fc"]["kernel"]
        held.append(kernel.addressable_shards[0].data.size / kernel.size)
        return iter([["."]])

    monkeypatch.setattr("generate.stream_text", spy)
    call("generate.py", "--run-dir", cube)
    call("generate.py", "--run-dir", cube, "--mesh.tensor", 2)
    call("generate.py", "--run-dir", cube, "--mesh.fsdp", 4, "--mesh.tensor", 2)
    assert held == [1, 1 / 2, 1 / 8]
    with pytest.raises(ValueError, match=r"mesh\.data=2 shares no work here; give"):
        call("generate.py", "--run-dir", cube, "--mesh.data", 2)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, CUBE])
def test_an_evaluation_does_not_depend_on_the_mesh(cube, call, mesh):
    def nats(mesh):
        flags = [x for axis, n in mesh.items() for x in (f"--mesh.{axis}", n)]
        out, _ = call("jaxgpt", "evaluate", "--run-dir", cube, "--json", *flags)
        return json.loads(out)["nats_per_token"]

    assert nats(mesh) == pytest.approx(nats(ONE), abs=1e-6)
    with pytest.raises(ValueError, match=r"16 sequences .* over mesh.data=3"):
        nats({"data": 3})


def test_a_sharded_run_is_exported_whole(cube, call, tmp_path):
    call("jaxgpt", "export", "nanogpt", cube, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt")["model"]
    params = load_run(cube).params
    kernel = params["h"]["mlp"]["c_fc"]["kernel"][1]
    np.testing.assert_array_equal(state["transformer.h.1.mlp.c_fc.weight"].T, kernel)


def test_training_starts_on_a_mesh_from_a_run_of_another(cube, tmp_path):
    config = changed(
        load_config(cube),
        model={"block_size": 4},
        train={"init_from": str(find_checkpoint(cube, "latest"))},
    )
    for name, mesh in (("one", ONE), ("parts", {"data": 1, "fsdp": 4, "tensor": 2})):
        config = changed(config, mesh={"fsdp": 1, "tensor": 1} | mesh)
        train.train(config, tmp_path / name, resume=False, overwrite=False)
    one, parts = losses(tmp_path / "one"), losses(tmp_path / "parts")
    assert len(one) > 5
    np.testing.assert_allclose(parts, one, rtol=0, atol=2e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
        load_run(tmp_path / "one").params,
        load_run(tmp_path / "parts").params,
    )
