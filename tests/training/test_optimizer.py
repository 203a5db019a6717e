import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt import OptimizerConfig
from jaxgpt.interop.torch_parity import nanogpt_learning_rate
from jaxgpt.models import build_model
from jaxgpt.training.optimizer import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule_is_nanogpts(warmup):
    config = OptimizerConfig(warmup_steps=warmup)
    schedule = learning_rate_schedule(config, 50)
    for step in range(60):
        expected = nanogpt_learning_rate(step, config, 50)
        assert schedule(step) == pytest.approx(expected, rel=1e-5)


def test_equal_rates_without_warmup_are_a_constant_schedule():
    config = OptimizerConfig(learning_rate=1e-2, min_lr=1e-2, warmup_steps=0)
    schedule = learning_rate_schedule(config, 10)
    assert [float(schedule(step)) for step in (0, 5, 20)] == pytest.approx([1e-2] * 3)


def test_only_matrices_and_embeddings_decay():
    model = build_model(changed(TINY, model={"bias": True}).model, "cpu")
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params))
        if decays
    }
    assert decayed == {
        "wte.embedding",
        "wpe.embedding",
        "h.attn.c_attn.kernel",
        "h.attn.c_proj.kernel",
        "h.mlp.c_fc.kernel",
        "h.mlp.c_proj.kernel",
    }


def test_updates_are_those_of_clipped_adamw_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1, min_lr=0.1, warmup_steps=0, weight_decay=0.5, grad_clip=1.0
    )
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    optimizer = make_optimizer(config, max_steps=10)
    state = optimizer.init(params)
    expected = {name: np.array(p, np.float64) for name, p in params.items()}
    m = {name: 0.0 for name in params}
    v = {name: 0.0 for name in params}
    for t in range(1, 4):
        grads = {"kernel": jnp.array([3.0 * t, 0.1]), "bias": jnp.array([-4.0])}
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name in expected:
            g = np.array(grads[name], np.float64) / max(1.0, norm)
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            m_hat = m[name] / (1 - config.beta1**t)
            v_hat = v[name] / (1 - config.beta2**t)
            decay = config.weight_decay if name == "kernel" else 0
            expected[name] -= 0.1 * (
                m_hat / (np.sqrt(v_hat) + 1e-8) + decay * expected[name]
            )
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_grad_clip_of_zero_does_not_clip():
    config = OptimizerConfig(grad_clip=0.0, beta1=0.0, warmup_steps=0)
    params = {"bias": jnp.zeros(2)}
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(params)
    _, after = optimizer.update({"bias": jnp.full(2, 100.0)}, state, params)
    moments = [leaf for leaf in jax.tree.leaves(after) if leaf.shape == (2,)]
    assert any(np.allclose(leaf, 100.0) for leaf in moments)
