from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import TINY, changed, mesh_of

from jaxgpt.models import build_model
from jaxgpt.text.batches import training_source
from jaxgpt.training import diagnosis
from jaxgpt.training.objectives import next_token
from jaxgpt.training.step import create_state

TOKENS = np.random.default_rng(0).integers(0, 11, 200).astype(np.uint16)
INF, NAN = float("inf"), float("nan")
SMALL = changed(TINY, data={"batch_size": 4}, mesh={"data": 1})


def first_non_finite(config, path, layer, value):
    """The first non-finite layer if one parameter, at `path`, has `value` in it."""

    def put(where, leaf):
        if jax.tree_util.keystr(where, simple=True, separator=".") != path:
            return leaf
        index = (0,) * leaf.ndim if layer is None else (layer, *(0,) * (leaf.ndim - 1))
        return leaf.at[index].set(value)

    mesh = mesh_of(config)
    state = create_state(build_model(config.model, "cpu"), config, mesh)
    state = state.replace(params=jax.tree_util.tree_map_with_path(put, state.params))
    source = training_source(TOKENS, config)
    return diagnosis.first_non_finite_layer(state, next_token, source, config, mesh)


@pytest.mark.parametrize(
    ("path", "layer", "value", "name"),
    [
        ("h.attn.c_proj.kernel", 0, NAN, "h.0.attn.c_proj"),
        ("h.mlp.c_fc.kernel", 1, INF, "h.1.mlp.c_fc"),
        ("wpe.embedding", None, INF, "wpe"),
        ("ln_f.scale", None, NAN, "ln_f"),
        ("", None, NAN, ""),
    ],
)
def test_the_first_layer_with_non_finite_outputs_is_named(path, layer, value, name):
    assert first_non_finite(SMALL, path, layer, value) == name


MICROBATCHES = {"batch_size": 8, "gradient_accumulation_steps": 2}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"remat": True}, "data": MICROBATCHES},
        pytest.param(
            {"model": {"compute_dtype": "bfloat16"}, "mesh": MESH},
            marks=pytest.mark.devices,
        ),
    ],
)
def test_a_layer_is_named_under_remat_microbatches_and_meshes(sections):
    config = changed(SMALL, **sections)
    assert first_non_finite(config, "h.mlp.c_fc.kernel", 1, INF) == "h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("architecture", "path"),
    [("bigram", "table.embedding"), ("layer-norm", "lm_head.kernel")],
)
def test_a_layer_of_the_lectures_models_is_named(architecture, path):
    config = changed(SMALL, model={"architecture": architecture})
    name, _ = path.split(".")
    assert first_non_finite(config, path, None, NAN) == name


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("h.1.mlp", r"step 3\b.*h\.1\.mlp"),
        ("", r"step 3 are finite"),
        (RuntimeError("too much"), r"step 3\b.*too much"),
    ],
)
def test_an_error_keeps_its_message_and_gets_the_diagnosis(
    monkeypatch, result, message
):
    def diagnose(*args):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(diagnosis, "first_non_finite_layer", diagnose)
    state, unused = SimpleNamespace(step=2), [None] * 4
    with (
        pytest.raises(FloatingPointError, match=f"^loss is nan at step 3; .*{message}"),
        diagnosis.diagnose_non_finite(lambda: state, *unused),
    ):
        raise FloatingPointError("loss is nan at step 3")
