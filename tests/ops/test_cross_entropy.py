from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.ops import cross_entropy, head_loss, head_losses

MODULE = import_module("jaxgpt.ops.cross_entropy")  # the function has its name

B, T, C, V = 2, 12, 8, 50
X_BTC, TABLE_VC = (
    jax.random.normal(jax.random.key(seed), shape)
    for seed, shape in enumerate([(B, T, C), (V, C)])
)
TARGETS_BT = jax.random.randint(jax.random.key(2), (B, T), 0, V)


def losses_of_all_logits(x_BTC, table_VC):
    logits_BTV = jnp.einsum("BTC,VC->BTV", x_BTC, table_VC)
    return cross_entropy(logits_BTV, TARGETS_BT)


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    probs = np.array([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]])
    losses = cross_entropy(jnp.log(probs) + 7, jnp.array([[1, 2]]))
    np.testing.assert_allclose(losses, -np.log([[0.5, 0.8]]), rtol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "gpu"])
@pytest.mark.parametrize(("at_once", "chunks"), [(2**23, 1), (384, 2), (1, T)])
def test_losses_and_gradients_in_chunks_are_those_of_all_logits(
    monkeypatch, at_once, chunks, platform
):
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", at_once)
    losses_BT = head_losses(X_BTC, TABLE_VC, TARGETS_BT, platform)
    whole_BT = losses_of_all_logits(X_BTC, TABLE_VC)
    np.testing.assert_allclose(losses_BT, whole_BT, rtol=1e-6)

    def chunked(*weights):
        return 3 * head_loss(*weights, TARGETS_BT, platform) / TARGETS_BT.size

    def whole(*weights):
        return 3 * losses_of_all_logits(*weights).mean()

    found, expected = (
        jax.value_and_grad(loss, argnums=(0, 1))(X_BTC, TABLE_VC)
        for loss in (chunked, whole)
    )
    assert f"length={chunks}\n" in str(
        jax.make_jaxpr(jax.grad(chunked))(X_BTC, TABLE_VC)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        found,
        expected,
    )
