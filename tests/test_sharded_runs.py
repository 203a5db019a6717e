"""Runs whose parameters are sharded over 8 devices, in everything that reads a run."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from conftest import TEXT, TINY, changed, losses

import train
from jaxgpt import load_run
from jaxgpt.run import find_checkpoint, load_config

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def flags(mesh):
    return [flag for axis, size in mesh.items() for flag in (f"--mesh.{axis}", size)]


@pytest.fixture(scope="module")
def run_on(make_once):
    """Trains on a mesh, for 4 steps by default; returns the run's directory."""

    def run_on(mesh, steps=4):
        def make(folder):
            (folder / "tales.txt").write_text(TEXT, encoding="utf-8")
            config = changed(
                TINY,
                model={"vocab_size": None},
                data={"path": (str(folder / "tales.txt"),)},
                optimizer={"min_lr": TINY.optimizer.learning_rate},  # for any max_steps
                train={"max_steps": steps, "log_interval": 1},
                mesh=mesh,
            )
            train.train(config, folder / "run", resume=False, overwrite=False)

        name = "sharded-" + "-".join(map(str, [*mesh.values(), steps]))
        return make_once(name, make) / "run"

    return run_on


@pytest.fixture(scope="module")
def cube(run_on):
    return run_on(CUBE)


def assert_same_losses(run_dir, other, steps):
    found, expected = losses(run_dir), losses(other)
    assert [*found] == [*expected] == [*range(1, steps + 1)]
    found, expected = [*found.values()], [*expected.values()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CUBE, ONE | {"fsdp": 8}),
        pytest.param(CUBE, ONE, marks=pytest.mark.devices),
        pytest.param(ONE | {"fsdp": 8}, CUBE, marks=pytest.mark.devices),
        pytest.param(ONE, ONE | {"fsdp": 2, "tensor": 2}, marks=pytest.mark.devices),
    ],
)
def test_a_run_resumes_on_another_mesh_with_the_same_losses(
    run_on, call, tmp_path, before, after
):
    shutil.copytree(run_on(before), tmp_path / "run")
    resume = ("--out-dir", tmp_path / "run", "--resume", "--train.max-steps", 8)
    call("train.py", *resume, *flags(after))
    assert load_run(tmp_path / "run", "latest").step == 8
    assert_same_losses(tmp_path / "run", run_on(ONE, steps=8), 8)


@pytest.mark.devices
def test_a_run_on_a_mesh_starts_from_the_weights_of_another(cube, tmp_path):
    config = changed(
        load_config(cube),
        model={"block_size": 4},
        train={"init_from": str(find_checkpoint(cube, "latest"))},
    )
    for name, mesh in (("one", ONE), ("parts", {"data": 1, "fsdp": 4, "tensor": 2})):
        config = changed(config, mesh=mesh)
        train.train(config, tmp_path / name, resume=False, overwrite=False)
    assert_same_losses(tmp_path / "parts", tmp_path / "one", 4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
        load_run(tmp_path / "one").params,
        load_run(tmp_path / "parts").params,
    )


@pytest.mark.parametrize(
    "mesh", [{"tensor": 2}, pytest.param({"fsdp": -1}, marks=pytest.mark.devices)]
)
def test_devices_that_share_a_model_generate_the_same_text_as_one(cube, call, mesh):
    options = ("--run-dir", cube, "--prompt", "Lear", "--max-new-tokens", 20)
    samples = ("--num-samples", 2, "--temperature", 0.5)
    alone, _ = call("generate.py", *options, *samples)
    assert len(alone) > 48
    assert call("generate.py", *options, *samples, *flags(mesh)).out == alone


def test_devices_that_share_a_model_load_only_their_part(cube, call, monkeypatch):
    held = []

    def spy(run, *args, **options):
        kernel = run.params["h"]["mlp"]["c_fc"]["kernel"]
        held.append(kernel.addressable_shards[0].data.size / kernel.size)
        return iter([["."]])

    monkeypatch.setattr("generate.stream_text", spy)
    for mesh in ({}, {"tensor": 2}, {"fsdp": 4, "tensor": 2}):
        call("generate.py", "--run-dir", cube, *flags(mesh))
    assert held == [1, 1 / 2, 1 / 8]
    with pytest.raises(ValueError, match=r"mesh\.data=2 "):
        call("generate.py", "--run-dir", cube, "--mesh.data", 2)


def test_an_evaluation_does_not_depend_on_the_mesh(cube, call):
    def nats(mesh):
        out, _ = call("jaxgpt", "evaluate", "--run-dir", cube, "--json", *flags(mesh))
        return json.loads(out)["nats_per_token"]

    expected = nats(ONE)
    for mesh in ({"fsdp": 8}, CUBE):
        assert nats(mesh) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"16 .* mesh\.data=3"):
        nats({"data": 3})


def test_a_sharded_run_is_exported_whole(cube, call, tmp_path):
    call("jaxgpt", "export", "nanogpt", cube, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt")["model"]
    kernel = load_run(cube).params["h"]["mlp"]["c_fc"]["kernel"][1]
    np.testing.assert_array_equal(state["transformer.h.1.mlp.c_fc.weight"].T, kernel)
