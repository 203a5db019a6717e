import dataclasses

import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, changed, mesh_of, traced_steps

from jaxgpt.config import ClassifierConfig, MaskedLMConfig, Seq2SeqConfig
from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.planning.flops import product_flops, step_flops
from jaxgpt.presets import PRESETS, lecture_bigram

# So short that no form of attention skips masked scores.
MODEL = {"n_head": 8, "n_embd": 128, "block_size": 64, "vocab_size": 512}


DEFAULT = ["smoke", "lecture-multi-head", "lecture-residual", "gpt2-124m"]
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name, make in PRESETS.items()
    if make().model.task == "next-token" and name not in ("lecture-bigram", *DEFAULT)
]


@pytest.mark.parametrize("preset", [*DEFAULT, *SLOW])
def test_a_step_takes_6_flops_per_weight_and_token_and_those_of_attention(preset):
    # Chowdhery et al. 2022 (PaLM), appendix B.
    config = changed(PRESETS[preset](), model={"vocab_size": 65})
    shape, params = config.model, parameter_shapes(config.model)
    weights = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" or path[0].key == "wte"
    )
    attention = 12 * shape.n_layer * shape.n_embd * shape.block_size
    texts = 2 if config.dpo else 1  # of each row
    tokens = config.data.batch_size * texts * shape.block_size
    assert step_flops(config) == tokens * (6 * weights + attention)


SHAPE = {"vocab_size": 300, "n_head": 4, "n_embd": 64, "n_layer": 3, "block_size": 100}
L, C, V, N = 3, 64, 300, 100
STACK = N * L * (24 * C**2 + 4 * N * C)  # one row, forward: matrices, and attention
CROSS = N * L * (8 * C**2 + 4 * N * C)


@pytest.mark.parametrize(
    ("model", "forward"),
    [
        (ClassifierConfig(**SHAPE, labels=("a", "b", "c")), STACK + 2 * C * 3),
        # Of the 99 tokens after the first, 15 are predicted.
        (MaskedLMConfig(**SHAPE), STACK + 15 * (2 * C**2 + 2 * C * V)),
        (Seq2SeqConfig(**SHAPE), 2 * STACK + CROSS + N * 2 * C * V),
    ],
)
def test_flops_of_encoders_are_those_of_their_matrices_and_attention(model, forward):
    config = dataclasses.replace(TINY, model=model)
    assert step_flops(config) == 3 * TINY.data.batch_size * forward


def test_flops_do_not_depend_on_how_the_model_is_computed():
    config = PRESETS["gpt2-124m"]()
    for fields in ({"remat": True}, {"unroll": 1}, {"dropout": 0.5}):
        assert step_flops(changed(config, model=fields)) == step_flops(config)


def test_a_bigram_table_has_no_matmuls():
    assert step_flops(changed(lecture_bigram(), model={"vocab_size": 65})) == 0


@pytest.mark.parametrize("architecture", ["gpt", "residual", "layer-norm"])
def test_flops_are_those_that_xla_counts(architecture):
    # One layer, since XLA counts the body of a scan over layers once.
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 128, "block_size": 128}
    fields = {"architecture": architecture, "vocab_size": 512, "dropout": 0.0}
    config = changed(TINY, model=shape | fields, data={"batch_size": 2})
    model, tokens = build_model(config.model, "cpu"), jnp.zeros((2, 128), jnp.int32)

    def loss(params):
        return model.apply({"params": params}, tokens).sum()

    lowered = jax.jit(jax.grad(loss)).lower(parameter_shapes(config.model))
    counted = lowered.compile().cost_analysis()["flops"]
    assert step_flops(config) == pytest.approx(counted, rel=0.1)


def traced(**sections):
    config = changed(TINY, model=MODEL | {"dropout": 0.0}, data={"batch_size": 16})
    config = changed(config, **sections)
    model = build_model(config.model, "cpu")
    return config, traced_steps(model, config, mesh_of(config))


WIDER = [pytest.param(*each, marks=pytest.mark.devices) for each in ((1, 2), (5, 1))]


@pytest.mark.parametrize(("layers", "microbatches"), [(1, 1), (5, 2), *WIDER])
def test_flops_of_a_traced_step_are_those_of_its_config(layers, microbatches):
    data = {"gradient_accumulation_steps": microbatches}
    config, trace = traced(model={"n_layer": layers}, data=data)
    assert product_flops(trace.jaxpr) == pytest.approx(step_flops(config), rel=0.01)


def test_remat_costs_about_a_forward_pass_more():
    config, trace = traced(model={"n_layer": 5, "remat": True})
    ratio = product_flops(trace.jaxpr) / step_flops(config)
    assert 1.2 < ratio < 4 / 3


MORE = [pytest.param(*m, marks=pytest.mark.devices) for m in ((8, 1), (1, 8), (1, 1))]


@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), *MORE])
def test_8_devices_share_all_matmuls_and_repeat_none(data, fsdp):
    mesh = {"data": data, "fsdp": fsdp, "tensor": 8 // (data * fsdp)}
    # One layer, since XLA counts the body of a scan once.
    _, trace = traced(model={"n_layer": 1}, mesh=mesh)
    each = trace.lower().compile().cost_analysis()["flops"]
    assert 8 * each == pytest.approx(product_flops(trace.jaxpr), rel=0.1)
