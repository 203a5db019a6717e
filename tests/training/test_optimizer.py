import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt import OptimizerConfig
from jaxgpt.interop.torch_parity import nanogpt_learning_rate
from jaxgpt.models import parameter_shapes
from jaxgpt.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer

CONSTANT = {"learning_rate": 0.1, "min_lr": 0.1, "warmup_steps": 0}


@pytest.mark.parametrize(
    "fields", [CONSTANT, *({"warmup_steps": steps} for steps in (0, 1, 10))]
)
def test_the_schedule_is_nanogpts(fields):
    config = OptimizerConfig(**fields)
    schedule = learning_rate_schedule(config, 50)
    for step in range(60):
        expected = nanogpt_learning_rate(step, config, 50)
        assert schedule(step) == pytest.approx(expected, rel=1e-5)


def test_only_matrices_and_embeddings_decay():
    mask = decay_mask(parameter_shapes(changed(TINY, model={"bias": True}).model))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if decays
    }
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    kernels = {f"h.{matrix}.kernel" for matrix in matrices}
    assert decayed == {"wte.embedding", "wpe.embedding"} | kernels


@pytest.mark.parametrize("clip", [1.0, 0.0])  # 0 disables clipping
def test_updates_are_those_of_clipped_adamw(clip):
    config = OptimizerConfig(**CONSTANT, weight_decay=0.5, grad_clip=clip)
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    optimizer = make_optimizer(config, max_steps=10)
    state = optimizer.init(params)
    expected = {name: np.array(p, np.float64) for name, p in params.items()}
    m, v = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    for t in range(1, 4):
        grads = {"kernel": jnp.array([3.0 * t, 0.1]), "bias": jnp.array([-4.0])}
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name in expected:
            g = np.array(grads[name], np.float64) / (max(1.0, norm) if clip else 1.0)
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            m_hat = m[name] / (1 - config.beta1**t)
            v_hat = v[name] / (1 - config.beta2**t)
            decay = config.weight_decay if name == "kernel" else 0
            step = m_hat / (np.sqrt(v_hat) + 1e-8) + decay * expected[name]
            expected[name] -= config.learning_rate * step
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)
