import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgpt import runtime
from jaxgpt.models.layers import dropout_bits, gelu, look_up

KINDS = ["cpu", "NVIDIA H100", "TPU v5 lite"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_frequent_token_counts_every_place_it_stands(dtype):
    table_VC, tokens_BT = jnp.zeros((3, 2)), jnp.array([[1, 2] + [1] * 998])

    def total(table_VC):
        return look_up(table_VC, tokens_BT, dtype).sum(dtype=jnp.float32)

    assert jax.grad(total)(table_VC).tolist() == [[0, 0], [999, 999], [1, 1]]
    drawn_VC = jax.random.normal(jax.random.key(0), (3, 2))
    found_BTC = look_up(drawn_VC, tokens_BT, dtype)
    np.testing.assert_array_equal(found_BTC, drawn_VC.astype(dtype)[tokens_BT])


def test_dropout_bits_are_as_those_of_fair_coins():
    keys = jax.random.split(jax.random.key(1), 32)
    bits = np.asarray(dropout_bits(keys, (16, 64, 32)))
    assert len(np.unique(bits)) > 0.999 * bits.size  # 0.9999 of them are expected
    coins = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32) - 0.5
    spread = 5 * 0.5 / len(coins) ** 0.5  # five standard deviations
    assert abs(coins.mean(axis=0)).max() < spread
    together = coins.T @ coins / len(coins) - np.eye(32) / 4
    assert abs(together).max() < 2 * spread
    # Neither neighbours along an axis nor rows have to do with each other.
    for axis in range(bits.ndim):
        low = bits < 0.2 * 2**32
        pairs = low & np.roll(low, 1, axis)
        assert abs(low.mean() - 0.2) < 5 * 0.4 / bits.size**0.5
        assert abs(pairs.mean() - 0.04) < 5 * 0.2 / bits.size**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "approximate"), [("exact", "none"), ("tanh", "tanh")])
def test_gelu_and_its_gradient_are_pytorchs(monkeypatch, kind, name, approximate):
    monkeypatch.setattr(runtime, "device_kind", lambda: kind)
    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.gelu(theirs, approximate=approximate)
    y.sum().backward()
    np.testing.assert_allclose(gelu(jnp.array(x), name), y.detach(), atol=2e-6)
    gradient = jax.vmap(jax.grad(lambda x: gelu(x, name)))(x)
    np.testing.assert_allclose(gradient, theirs.grad, atol=5e-6)


def test_a_gpu_keeps_nothing_for_gelus_gradient_but_its_input(monkeypatch):
    x = jax.random.normal(jax.random.key(0), (16, 16), jnp.bfloat16)

    def kept(kind):
        monkeypatch.setattr(runtime, "device_kind", lambda: kind)
        _, backward = jax.vjp(lambda x: gelu(x, "exact"), x)
        return sum(each.nbytes for each in jax.tree.leaves(backward) if each.size > 1)

    cpus, gpus = map(kept, KINDS[:2])
    assert gpus == x.nbytes < cpus
