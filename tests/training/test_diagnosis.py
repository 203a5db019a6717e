import re

import jax
import numpy as np
import pytest
from conftest import TINY, changed

import train
from jaxgpt import load_run
from jaxgpt.models import build_model
from jaxgpt.parallel.feeding import read_batches
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.text.corpus import load_corpus
from jaxgpt.training.diagnosis import diagnose, load_blowup
from jaxgpt.training.monitor import read_rows
from jaxgpt.training.step import (
    compile_train_steps,
    create_state,
    make_train_step,
    step_key,
)

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 8, TINY.model.block_size))
BATCH = tuple(TOKENS.astype(np.int32))
INF = float("inf")


def parts(config):
    mesh, model = make_mesh(config), build_model(config.model, "cpu")
    return mesh, model, create_state(model, config, mesh)


def spoilt(params, path, layer=None, value=INF):
    """The parameters with `value` in one place."""

    def spoil(where, leaf):
        if jax.tree_util.keystr(where, simple=True, separator=".") != path:
            return leaf
        index = (0,) * leaf.ndim if layer is None else (layer, *(0,) * (leaf.ndim - 1))
        return leaf.at[index].set(value)

    return jax.tree_util.tree_map_with_path(spoil, params)


def found_in(config, params):
    mesh = make_mesh(config)
    return diagnose(config, params, BATCH, step_key(config, 0), mesh)


MESHES = {
    "one device": {},
    "pieces": {"data": {"gradient_accumulation_steps": 4}, "mesh": {"data": 1}},
    "remat": {"model": {"remat": True}},
    "fsdp and tensor": {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
}


@pytest.mark.parametrize("sections", MESHES.values(), ids=MESHES)
def test_a_diagnosis_has_the_loss_and_the_norm_of_the_step_itself(sections):
    config = changed(TINY, **sections)
    mesh, model, state = parts(config)
    with jax.set_mesh(mesh):
        _, metrics = jax.jit(make_train_step(model, config))(state, BATCH)
    found = diagnose(config, state.params, BATCH, step_key(config, 0), mesh)
    np.testing.assert_allclose(found.loss, metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(found.grad_norm, metrics["grad_norm"], rtol=1e-5)
    assert found.first == ""
    layers = list(found.activations)
    assert layers[:3] == ["wte", "wpe", "drop"]
    assert layers[-3:] == ["h.1", "ln_f", "logits"]
    assert layers.index("h.0") < layers.index("h.1.ln_1")
    assert next(iter(found.gradients)) == "ln_f.scale"
    assert list(found.gradients)[-1] == "wte.embedding"
    params = spoilt(state.params, "h.mlp.c_fc.kernel", 1)
    assert found_in(config, params).first == "activations of h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("path", "layer", "value", "name"),
    [
        ("h.mlp.c_fc.kernel", 1, INF, "activations of h.1.mlp.c_fc"),
        ("h.attn.c_proj.kernel", 0, float("nan"), "activations of h.0.attn.c_proj"),
        ("wpe.embedding", None, INF, "activations of wpe"),
        ("ln_f.scale", None, float("nan"), "activations of ln_f"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(path, layer, value, name):
    _, _, state = parts(TINY)
    found = found_in(TINY, spoilt(state.params, path, layer, value))
    assert found.first == name
    assert not np.isfinite(found.loss)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_scores_that_overflow_are_told_by_the_attention_weights(dropout):
    config = changed(TINY, model={"dropout": dropout})
    _, _, state = parts(config)
    kernel = state.params["h"]["attn"]["c_attn"]["kernel"]
    state.params["h"]["attn"]["c_attn"]["kernel"] = kernel.at[1].multiply(1e21)
    found = found_in(config, state.params)
    assert found.first == "activations of h.1.attn.attn_dropout"


@pytest.mark.parametrize(
    ("scale", "name"),
    [
        (1e12, "gradients of h.0.mlp.c_proj.kernel"),
        (1.0, "squares of the gradients of h.0.mlp.c_proj.kernel"),
    ],
)
def test_gradients_that_overflow_are_named_though_all_activations_are_finite(
    scale, name
):
    _, _, state = parts(TINY)
    mlp, ln_f = state.params["h"]["mlp"], state.params["ln_f"]
    for layer, factor in (("c_fc", 1e30), ("c_proj", 1e-30)):
        kernel = mlp[layer]["kernel"]
        mlp[layer]["kernel"] = kernel.at[0].multiply(factor)
    ln_f["scale"] *= scale
    found = found_in(TINY, state.params)
    assert all(map(np.isfinite, found.activations.values()))
    assert np.isfinite(found.loss)
    assert found.first == name


@pytest.mark.parametrize("architecture", ["bigram", "residual", "layer-norm"])
def test_a_rung_of_the_lecture_is_diagnosed_too(architecture):
    reset = {"n_layer": 4, "n_head": 4, "n_embd": 128, "dropout": 0.0}
    model = {"architecture": architecture}
    config = changed(TINY, model=model | (reset if architecture == "bigram" else {}))
    _, _, state = parts(config)
    path = jax.tree_util.tree_leaves_with_path(state.params)[-1][0]
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    assert found_in(config, state.params).first == ""
    first = found_in(config, spoilt(state.params, name, value=float("nan"))).first
    assert first == f"activations of {name.rpartition('.')[0]}"


@pytest.fixture
def wild(tmp_path, text_file):
    """A config whose second step is not finite."""
    config = changed(
        TINY,
        model={"vocab_size": None},
        data={"path": (str(text_file),)},
        optimizer={"learning_rate": 1e38, "warmup_steps": 0, "grad_clip": 0.0},
        train={"log_interval": 1, "steps_per_call": 4},
    )
    return config, tmp_path / "run"


def run(config, run_dir):
    train.train(config, run_dir, resume=False, overwrite=False)


def test_a_step_that_blows_up_leaves_what_it_takes_to_take_it_again(wild, call):
    config, run_dir = wild
    with pytest.raises(FloatingPointError, match="at step 2; ") as stopped:
        run(config, run_dir)
    (name,) = re.findall(r"of step 2 the (.*) are the first", str(stopped.value))
    (command,) = re.findall(r"python -m jaxgpt (.*)$", str(stopped.value))
    out, _ = call("jaxgpt", *command.split())
    assert f"the first values that are not finite: {name}" in out
    assert re.search(rf"^  {re.escape(name.split()[-1])} +not finite$", out, re.M)
    assert "loss nan" in out
    out, _ = call("jaxgpt", *command.split(), "--one-device")
    assert f"not finite: {name}" in out


def test_the_bundle_has_the_parameters_and_the_batch_of_the_step_itself(wild):
    config, run_dir = wild
    with pytest.raises(FloatingPointError):
        run(config, run_dir)
    corpus, config = load_corpus(config, print)
    mesh, model, state = parts(config)
    train_steps = compile_train_steps(model, config, mesh, 4)  # as the run has called
    batches = read_batches(corpus.train, range(4), config, mesh)
    state, _ = train_steps(state, batches)
    saved = load_blowup(run_dir / "blowup", mesh)
    assert saved.step == state.step == 1
    jax.tree.map(np.testing.assert_array_equal, saved.params, state.params)
    for ours, theirs in zip(saved.batch, batches, strict=True):
        np.testing.assert_array_equal(ours, theirs[1])
    assert saved.key == step_key(config, 1)
    assert load_run(run_dir / "blowup").tokenizer.characters
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [0, 1]


def test_a_bundle_that_is_damaged_is_named(wild):
    config, run_dir = wild
    with pytest.raises(FileNotFoundError, match="give the folder blowup of a run"):
        load_blowup(run_dir, make_mesh(config))
    with pytest.raises(FloatingPointError):
        run(config, run_dir)
    (run_dir / "blowup" / "step.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"step\.npz is damaged"):
        load_blowup(run_dir / "blowup", make_mesh(config))


def test_the_error_is_told_whatever_happens_to_its_diagnosis(wild, monkeypatch):
    def fail(*args):
        raise RuntimeError("too much")

    config, run_dir = wild
    where = "jaxgpt.training.diagnosis"
    monkeypatch.setattr(f"{where}.diagnose", fail)
    monkeypatch.setattr(f"{where}.save_params", fail)
    message = r"^loss is nan at step 2; .* kept \(too much\); .* at \(too much\)$"
    with pytest.raises(FloatingPointError, match=message):
        run(config, run_dir)
