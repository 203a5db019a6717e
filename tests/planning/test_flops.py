import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, changed, traced_steps

from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning.flops import product_flops, step_flops
from jaxgpt.presets import PRESETS, lecture_bigram

# So short that no form of attention leaves out masked scores.
MODEL = {"n_head": 8, "n_embd": 128, "block_size": 64, "vocab_size": 512}


@pytest.mark.parametrize(
    "preset", [name for name in PRESETS if name != "lecture-bigram"]
)
def test_flops_of_a_transformer_are_6_per_matrix_entry_and_token_and_attentions(preset):
    # Chowdhery et al. 2022 (PaLM), appendix B.
    config = changed(PRESETS[preset](), model={"vocab_size": 65})
    shape, params = config.model, parameter_shapes(config.model)
    multiplying = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" or path[0].key == "wte"
    )
    attention = 12 * shape.n_layer * shape.n_embd * shape.block_size
    tokens = config.data.batch_size * shape.block_size
    assert step_flops(config) == tokens * (6 * multiplying + attention)


@pytest.mark.parametrize("fields", [{"remat": True}, {"unroll": 1}, {"dropout": 0.5}])
def test_flops_do_not_depend_on_how_the_model_is_computed(fields):
    config = PRESETS["gpt2-124m"]()
    assert step_flops(changed(config, model=fields)) == step_flops(config)


def test_a_table_of_bigrams_multiplies_nothing():
    assert step_flops(changed(lecture_bigram(), model={"vocab_size": 65})) == 0


@pytest.mark.parametrize("architecture", ["gpt", "residual", "layer-norm"])
def test_flops_are_those_that_xla_counts(architecture):
    # One layer: XLA counts the body of a scan over layers once.
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 128, "block_size": 128}
    fields = {"architecture": architecture, "vocab_size": 512, "dropout": 0.0}
    config = changed(TINY, model=shape | fields, data={"batch_size": 2})
    model = build_model(config.model, "cpu")
    tokens = jnp.zeros((2, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params):
        return model.apply(params, tokens).sum()

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    assert step_flops(config) == pytest.approx(counted, rel=0.1)


def traced(**sections):
    config = changed(TINY, model=MODEL | {"dropout": 0.0}, data={"batch_size": 16})
    config = changed(config, **sections)
    mesh = make_mesh(config, lambda line: None)
    return config, traced_steps(build_model(config.model, "cpu"), config, mesh)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("layers", [1, 5])
def test_products_of_a_step_are_6_per_parameter_and_token_and_attentions(
    layers, microbatches
):
    config, trace = traced(
        model={"n_layer": layers}, data={"gradient_accumulation_steps": microbatches}
    )
    assert product_flops(trace.jaxpr) == pytest.approx(step_flops(config), rel=0.01)


def test_recomputation_costs_about_a_forward_pass_more():
    config, trace = traced(model={"n_layer": 5, "remat": True})
    ratio = product_flops(trace.jaxpr) / step_flops(config)
    assert 1.2 < ratio < 4 / 3


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_devices_share_all_products_and_do_none_twice(shape):
    mesh = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    # One layer, since XLA counts the body of a scan once.
    _, trace = traced(model={"n_layer": 1}, mesh=mesh)
    each = trace.lower().compile().cost_analysis()["flops"]
    assert 8 * each == pytest.approx(product_flops(trace.jaxpr), rel=0.1)
