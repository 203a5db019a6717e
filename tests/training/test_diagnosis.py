from functools import partial

import jax
import numpy as np
import pytest
from conftest import TINY, changed

import train
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.text.batches import training_source
from jaxgpt.training.diagnosis import first_non_finite_layer
from jaxgpt.training.monitor import read_rows
from jaxgpt.training.objectives import next_token
from jaxgpt.training.step import create_state

TOKENS = np.random.default_rng(0).integers(0, 11, 200).astype(np.uint16)
INF, NAN = float("inf"), float("nan")


def first_in(config, spoil):
    """What is found first in the first step of parameters that `spoil` has changed."""
    mesh = make_mesh(config, lambda line: None)
    state = create_state(build_model(config.model, "cpu"), config, mesh)
    state = state.replace(params=jax.tree_util.tree_map_with_path(spoil, state.params))
    source = training_source(TOKENS, config)
    return first_non_finite_layer(state, next_token, source, config, mesh)


def put(where, layer, value, path, leaf):
    """The leaf, at one path with `value` in one place."""
    if jax.tree_util.keystr(path, simple=True, separator=".") != where:
        return leaf
    index = (0,) * leaf.ndim if layer is None else (layer, *(0,) * (leaf.ndim - 1))
    return leaf.at[index].set(value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": {"gradient_accumulation_steps": 4}, "mesh": {"data": 1}},
        {"model": {"remat": True}},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
        {"model": {"compute_dtype": "bfloat16"}},
    ],
)
def test_a_layer_is_named_however_the_run_is_cut(sections):
    config = changed(TINY, **sections)
    spoil = partial(put, "h.mlp.c_fc.kernel", 1, INF)
    assert first_in(config, spoil) == "h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("path", "layer", "value", "name"),
    [
        ("h.attn.c_proj.kernel", 0, NAN, "h.0.attn.c_proj"),
        ("wpe.embedding", None, INF, "wpe"),
        ("ln_f.scale", None, NAN, "ln_f"),
        ("", None, NAN, ""),
    ],
)
def test_the_first_values_that_are_not_finite_are_named(path, layer, value, name):
    assert first_in(TINY, partial(put, path, layer, value)) == name


@pytest.mark.parametrize("architecture", ["bigram", "residual", "layer-norm"])
def test_a_rung_of_the_lecture_is_looked_at_too(architecture):
    config = changed(TINY, model={"architecture": architecture})
    name = "table" if architecture == "bigram" else "lm_head"
    kind = "embedding" if architecture == "bigram" else "kernel"
    spoil = partial(put, f"{name}.{kind}", None, NAN)
    assert first_in(config, spoil) == name


@pytest.fixture
def blow_up(tmp_path, text_file):
    """Trains with a rate at which the second step is not finite; gives the error."""
    config = changed(
        TINY,
        model={"vocab_size": None},
        data={"path": (str(text_file),)},
        optimizer={"learning_rate": 1e38, "warmup_steps": 0, "grad_clip": 0.0},
        train={"log_interval": 1, "steps_per_call": 4},
    )

    def blow_up():
        with pytest.raises(FloatingPointError) as stopped:
            train.train(config, tmp_path / "run", resume=False, overwrite=False)
        rows = read_rows(tmp_path / "run" / "metrics.jsonl")
        return str(stopped.value), [row["step"] for row in rows]

    return blow_up


def test_a_run_that_blows_up_says_at_which_step_and_where(blow_up):
    error, steps = blow_up()
    assert error.startswith("loss is nan at step 2; ")
    assert "; the outputs of h.0.ln_1 in step 2 are the first that are not" in error
    assert steps == [0, 1]


def test_where_every_layer_is_finite_that_is_told(blow_up, monkeypatch):
    monkeypatch.setattr("jaxgpt.training.diagnosis._first_layer", lambda *args: "")
    error, _ = blow_up()
    assert error.endswith("; the outputs of every layer in step 2 are finite")


def test_the_error_is_told_whatever_happens_to_its_diagnosis(blow_up, monkeypatch):
    def fail(*args):
        raise RuntimeError("too much")

    monkeypatch.setattr("jaxgpt.training.diagnosis.first_non_finite_layer", fail)
    error, _ = blow_up()
    assert error.startswith("loss is nan at step 2; ")
    assert error.endswith("; the layers of step 2 could not be looked at (too much)")
