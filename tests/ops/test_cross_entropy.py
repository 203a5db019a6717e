from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PLATFORMS

from jaxgpt.ops import cross_entropy, head_loss_sum, head_losses

MODULE = import_module("jaxgpt.ops.cross_entropy")  # the function has its name

B, T, C, V = 2, 12, 8, 50
RNG = np.random.default_rng(0)
WEIGHTS = [RNG.normal(size=s).astype(np.float32) for s in [(B, T, C), (V, C)]]
TARGETS_BT = RNG.integers(V, size=(B, T))


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    probs = np.array([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]])
    losses = cross_entropy(jnp.log(probs) + 7, jnp.array([[1, 2]]))
    np.testing.assert_allclose(losses, -np.log([[0.5, 0.8]]), rtol=1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("at_once", "chunks"), [(2**23, 1), (384, 2), (1, T)])
def test_losses_and_gradients_in_chunks_are_those_of_all_logits(
    monkeypatch, at_once, chunks, platform
):
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", at_once)

    def chunked(x_BTC, table_VC):
        losses_BT = head_losses(x_BTC, table_VC, TARGETS_BT, platform)
        loss = 3 * head_loss_sum(x_BTC, table_VC, TARGETS_BT, platform) / (B * T)
        return loss, losses_BT

    def whole(x_BTC, table_VC):
        logits_BTV = jnp.einsum("BTC,VC->BTV", x_BTC, table_VC)
        losses_BT = cross_entropy(logits_BTV, TARGETS_BT)
        return 3 * losses_BT.mean(), losses_BT

    found, expected = (
        jax.jit(jax.value_and_grad(losses, argnums=(0, 1), has_aux=True))(*WEIGHTS)
        for losses in (chunked, whole)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        found,
        expected,
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], rtol=1e-6)  # of each token
    jaxpr = jax.make_jaxpr(jax.grad(lambda *weights: chunked(*weights)[0]))(*WEIGHTS)
    assert f"length={chunks}\n" in str(jaxpr)
