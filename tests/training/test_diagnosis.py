import re
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from conftest import TINY, changed, mesh_of

from jaxgpt.models import build_model
from jaxgpt.text.batches import longest_row, training_source
from jaxgpt.training import diagnosis
from jaxgpt.training.objectives import make_objective
from jaxgpt.training.step import create_state

TOKENS = np.random.default_rng(0).integers(0, 11, 200).astype(np.uint16)
INF, NAN = float("inf"), float("nan")
SMALL = changed(TINY, data={"batch_size": 4}, mesh={"data": 1})


MICROBATCHES = {"batch_size": 8, "gradient_accumulation_steps": 2}
CLASSIFIER = {"model": {"architecture": "classifier", "labels": ("no", "yes")}}
SEQ2SEQ = {"model": {"architecture": "seq2seq"}}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("path", "value", "sections"),
    [
        pytest.param(*("h.0.attn.c_proj.kernel", NAN, {}), marks=pytest.mark.devices),
        ("h.1.mlp.c_fc.kernel", INF, {"model": {"remat": True}, "data": MICROBATCHES}),
        pytest.param(
            *("h.1.mlp.c_fc.kernel", INF),
            {"model": {"compute_dtype": "bfloat16"}, "mesh": MESH},
            marks=pytest.mark.devices,
        ),
        ("wpe.embedding", INF, {}),
        ("ln_f.scale", NAN, {"data": {"packing": "conversations"}}),
        ("", NAN, {}),
        ("table.embedding", NAN, {"model": {"architecture": "bigram"}}),
        ("lm_head.kernel", NAN, {"model": {"architecture": "layer-norm"}}),
        pytest.param(
            *("lm_head.kernel", NAN, {"model": {"architecture": "residual"}}),
            marks=pytest.mark.devices,
        ),
        ("encoder.h.1.attn.c_attn.kernel", INF, CLASSIFIER),
        pytest.param("classifier.kernel", NAN, CLASSIFIER, marks=pytest.mark.devices),
        pytest.param(
            *("dense.kernel", NAN, {"model": {"architecture": "masked-lm"}}),
            marks=pytest.mark.devices,
        ),
        ("h.0.cross_attn.c_attn.kernel", NAN, SEQ2SEQ),
        pytest.param("encoder.ln_f.scale", NAN, SEQ2SEQ, marks=pytest.mark.devices),
    ],
)
def test_the_first_layer_with_non_finite_outputs_is_named(path, value, sections):
    def put(where, leaf):
        name = jax.tree_util.keystr(where, simple=True, separator=".")
        layer = [int(number) for number in re.findall(r"\d+", path)]
        first = (*layer, *(0,) * (leaf.ndim - len(layer)))
        return leaf.at[first].set(value) if name == re.sub(r"\d\.", "", path) else leaf

    config = changed(SMALL, **sections)
    mesh, source = mesh_of(config), training_source(TOKENS, config)
    if (config.model.task, config.data.packing) != ("next-token", "windows"):
        row = longest_row(config)
        source = lambda *_: jax.tree.map(lambda a: a.repeat(4, axis=0), row)  # noqa: E731
    state = create_state(build_model(config.model, "cpu"), config, mesh)
    state = state.replace(params=jax.tree_util.tree_map_with_path(put, state.params))
    arguments = state, make_objective, source, config, mesh
    found = diagnosis.first_non_finite_layer(*arguments)
    assert found == path.rpartition(".")[0]


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
    diagnose = Mock(side_effect=[result])
    monkeypatch.setattr(diagnosis, "first_non_finite_layer", diagnose)
    state, unused = SimpleNamespace(step=2), [None] * 4
    with (
        pytest.raises(FloatingPointError, match=f"^loss is nan at step 3; .*{message}"),
        diagnosis.diagnose_non_finite(lambda: state, *unused),
    ):
        raise FloatingPointError("loss is nan at step 3")
