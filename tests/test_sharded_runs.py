"""Runs whose parameters are sharded over 8 devices, in everything that reads a run."""

import json
import shutil
from contextlib import nullcontext
from signal import SIGTERM

import jax
import numpy as np
import pytest
import torch
from conftest import changed, losses

import train
from jaxgpt import exits, load_run
from jaxgpt.run import load_config
from jaxgpt.training.monitor import read_rows

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
FSDP = {"data": 1, "fsdp": 8, "tensor": 1}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
MORE = pytest.mark.devices


def flags(mesh):
    return [flag for axis, size in mesh.items() for flag in (f"--mesh.{axis}", size)]


@pytest.fixture(scope="module")
def stopped(tiny_run, make_once):
    """Trains as `tiny_run` but on a mesh, until a signal stops it after 4 steps."""

    def stopped(mesh):
        def make(folder):
            config = changed(
                load_config(tiny_run), mesh=mesh, train={"eval_interval": 4}
            )
            signals = iter([0, 0, 0, 0, SIGTERM])
            with pytest.MonkeyPatch.context() as patch:
                pending = nullcontext(lambda: next(signals))
                patch.setattr(exits, "deferred_interrupts", lambda: pending)
                train.train(config, folder / "run", resume=False, overwrite=False)

        return make_once("stopped-" + "-".join(map(str, mesh.values())), make) / "run"

    return stopped


@pytest.fixture(scope="module")
def cube(stopped):
    return stopped(CUBE)


def assert_same_losses(run_dir, other):
    found, expected = losses(run_dir), losses(other)
    assert found.keys() == expected.keys()
    found, expected = [*found.values()], [*expected.values()]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    found, expected = (
        {row["step"]: (row["train_loss"], row["val_loss"]) for row in rows}
        for rows in (evaluations(run_dir), evaluations(other))
    )
    steps = sorted(found.keys() & expected.keys())
    assert steps
    found, expected = ([losses[step] for step in steps] for losses in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def evaluations(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row for row in rows if row["event"] == "eval"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(CUBE, FSDP, marks=MORE),
        pytest.param(CUBE, ONE, marks=MORE),
        pytest.param(FSDP, CUBE, marks=MORE),
        pytest.param(ONE, ONE | {"fsdp": 2, "tensor": 2}, marks=MORE),
    ],
)
def test_a_run_resumed_on_another_mesh_has_the_losses_of_an_uninterrupted_run(
    stopped, tiny_run, call, tmp_path, before, after
):
    shutil.copytree(stopped(before), tmp_path / "run")
    assert max(losses(tmp_path / "run")) == 4
    call("train.py", "--out-dir", tmp_path / "run", "--resume", *flags(after))
    assert_same_losses(tmp_path / "run", tiny_run)


@MORE
def test_a_run_on_a_mesh_starts_from_the_weights_of_another(cube, tmp_path):
    init_from = {"init_from": str(cube / "checkpoints" / "4")}
    config = changed(load_config(cube), model={"block_size": 4}, train=init_from)
    for name, mesh in (("one", ONE), ("parts", {"data": 1, "fsdp": 4, "tensor": 2})):
        config = changed(config, mesh=mesh)
        train.train(config, tmp_path / name, resume=False, overwrite=False)
    assert_same_losses(tmp_path / "parts", tmp_path / "one")
    params = (load_run(tmp_path / name).params for name in ("parts", "one"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *params)


@pytest.mark.parametrize(
    ("mesh", "tokens"),
    [
        pytest.param({"tensor": 2}, 4, marks=MORE),
        pytest.param({"tensor": 2}, 20, marks=MORE),  # beyond the window
        pytest.param({"fsdp": -1}, 20, marks=MORE),
    ],
)
def test_devices_that_share_a_model_generate_the_same_text_as_one(
    cube, call, mesh, tokens
):
    options = ("--run-dir", cube, "--prompt", "be", "--max-new-tokens", tokens)
    samples = ("--num-samples", 2, "--temperature", 0.5)
    alone, _ = call("generate.py", *options, *samples)
    assert len(alone) > 2 * tokens
    assert call("generate.py", *options, *samples, *flags(mesh)).out == alone


@pytest.mark.devices
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


@pytest.mark.parametrize("mesh", [CUBE, pytest.param(FSDP, marks=MORE)])
def test_an_evaluation_does_not_depend_on_the_mesh(cube, call, mesh):
    def nats(mesh):
        out, _ = call("jaxgpt", "evaluate", "--run-dir", cube, "--json", *flags(mesh))
        return json.loads(out)["nats_per_token"]

    assert nats(mesh) == pytest.approx(nats(ONE), abs=1e-6)
    with pytest.raises(ValueError, match=r"16 .* mesh\.data=3"):
        nats({"data": 3})


def test_a_sharded_run_is_exported_whole(cube, call, tmp_path):
    call("jaxgpt", "export", "nanogpt", cube, tmp_path / "ckpt.pt")
    state = torch.load(tmp_path / "ckpt.pt")["model"]
    kernel = load_run(cube).params["h"]["mlp"]["c_fc"]["kernel"][1]
    np.testing.assert_array_equal(state["transformer.h.1.mlp.c_fc.weight"].T, kernel)
