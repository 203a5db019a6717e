import jax
import jax.numpy as jnp
import pytest
from conftest import TINY, changed

from jaxgpt.models import build_model
from jaxgpt.presets import PRESETS
from jaxgpt.training.plan import describe, step_flops


@pytest.mark.parametrize("architecture", ["gpt", "residual", "layer-norm"])
def test_flops_are_those_that_xla_counts(architecture):
    # One layer: XLA counts the body of a scan over layers once.
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 128, "block_size": 128}
    fields = {"architecture": architecture, "vocab_size": 512, "dropout": 0.0}
    config = changed(TINY, model=shape | fields, data={"batch_size": 2})
    model = build_model(config.model)
    tokens = jnp.zeros((2, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def loss(params):
        return model.apply(params, tokens).sum()

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    assert step_flops(config) == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accounted_for_without_its_corpus(preset, fresh_cache):
    config = PRESETS[preset]()
    if preset == "gpt2-124m":  # compiling it needs no accelerator, but a minute
        config = changed(config, model={"n_embd": 96, "block_size": 128})
    report = "\n".join(describe(config))
    assert "parameters" in report
    assert "temporary memory" in report
    assert not fresh_cache.exists()


def test_gpt2_124m_has_its_124_million_parameters():
    config = PRESETS["gpt2-124m"]()
    model = build_model(config.model)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    # As OpenAI counts them, less the biases that nanoGPT's recipe leaves out.
    biases = 12 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) + 768
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808 - biases
