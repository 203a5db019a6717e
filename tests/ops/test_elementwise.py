"""Embedding, GELU, dropout and matrix products: every form is the definition."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import PLATFORMS

from jaxgpt import ops
from jaxgpt.ops.dropout import random_bits

NORMAL = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradients_of_bfloat16_products_multiply_bfloat16_alone(platform):
    halves = jnp.array(NORMAL, jnp.bfloat16)

    def total(a, b):  # its gradient is float32
        return (ops.einsum("TC,CF->TF", a, b, jnp.float32, platform) ** 2).sum()

    gradient = jax.jit(jax.grad(total, (0, 1)))
    exact = jax.grad(lambda a, b: ((a @ b) ** 2).sum(), (0, 1))(*NORMAL)
    for found, expected in zip(gradient(*halves), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        error = jnp.linalg.norm(found - expected)
        assert error < 0.02 * jnp.linalg.norm(expected)
    types = re.findall(
        r"dot_general.*: \(tensor<\S+x(\w+)>, tensor<\S+x(\w+)>\)",
        gradient.lower(*halves).as_text(),
    )
    assert types == [("bf16", "bf16")] * 3


@pytest.mark.parametrize("platform", PLATFORMS)
def test_products_of_bfloat16_are_summed_in_float32_and_rounded_once(platform):
    ones, twos = jnp.ones((1, 1000), jnp.bfloat16), jnp.full((1000, 1), 2, jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        product = ops.einsum("TC,CF->TF", ones, twos, dtype, platform)
        assert product.dtype == dtype
        assert product == 2000  # a sum in bfloat16 would stop at 512


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_frequent_token_sums_all_its_occurrences(platform, dtype):
    table_VC, tokens_BT = jnp.zeros((3, 2)), jnp.array([[1, 2] + [1] * 248])

    def total(table_VC):
        x_BTC = ops.embed(table_VC, tokens_BT, dtype, platform)
        return x_BTC.sum(dtype=jnp.float32)

    assert jax.grad(total)(table_VC).tolist() == [[0, 0], [249, 249], [1, 1]]
    table_VC = jnp.array(NORMAL[0, :3, :2])
    x_BTC = ops.embed(table_VC, tokens_BT, dtype, platform)
    np.testing.assert_array_equal(x_BTC, table_VC.astype(dtype)[tokens_BT])


def test_only_tpus_sum_gradients_of_embeddings_in_bfloat16():
    table_VC, tokens_BT = jnp.zeros((1, 1)), jnp.zeros((1, 1000), int)

    def gradient(platform):
        embed = partial(ops.embed, dtype=jnp.bfloat16, platform=platform)
        return jax.grad(lambda t: embed(t, tokens_BT).sum(dtype=jnp.float32))(table_VC)

    assert [gradient(p).item() for p in PLATFORMS] == [1000, 256, 1000, 1000]


# As for users, LLVM optimises; without, the gradient of tanh is rounded more often.
OPTIMISED = {"xla_backend_optimization_level": 3}


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("kind", "approximate"), [("exact", "none"), ("tanh", "tanh")])
def test_gelu_and_its_gradient_are_pytorchs(platform, kind, approximate):
    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.gelu(theirs, approximate=approximate)
    y.sum().backward()
    gelu = partial(ops.gelu, kind=kind, platform=platform)
    np.testing.assert_allclose(gelu(jnp.array(x)), y.detach(), atol=2e-6)
    gradient = jax.jit(jax.vmap(jax.grad(gelu)), compiler_options=OPTIMISED)
    np.testing.assert_allclose(gradient(x), theirs.grad, atol=5e-6)


def test_gpus_store_only_the_input_for_the_gradient_of_gelu():
    x = jnp.array(NORMAL[0], jnp.bfloat16)

    def stored(platform):
        _, backward = jax.vjp(lambda x: ops.gelu(x, "exact", platform), x)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(backward) if leaf.size > 1)

    assert stored("cuda") == stored("gpu") == x.nbytes < stored("cpu")


def test_random_bits_are_independent_and_fair():
    keys = jax.random.split(jax.random.key(1), 32)
    bits = np.asarray(random_bits(keys, (16, 64, 32), (), ()))
    assert len(np.unique(bits)) > 0.999 * bits.size  # 0.9999 of them are expected
    coins = np.unpackbits(bits.view(np.uint8)).reshape(-1, 32) - 0.5
    spread = 5 * 0.5 / len(coins) ** 0.5  # five standard deviations
    assert abs(coins.mean(axis=0)).max() < spread
    covariance = coins.T @ coins / len(coins) - np.eye(32) / 4
    assert abs(covariance).max() < 2 * spread
    # Neighbours along an axis and neighbouring rows are independent.
    low = bits < 0.2 * 2**32
    assert abs(low.mean() - 0.2) < 5 * 0.4 / bits.size**0.5
    for axis in range(bits.ndim):
        pairs = low & np.roll(low, 1, axis)
        assert abs(pairs.mean() - 0.04) < 5 * 0.2 / bits.size**0.5


def test_dropout_of_a_block_is_that_of_its_place_in_the_row():
    keys = jax.random.split(jax.random.key(1), 2)
    whole = ops.dropout(0.4, keys, jnp.ones((2, 3, 8, 10)))
    np.testing.assert_allclose(np.unique(whole), [0, 1 / 0.6])
    place = {"start": (0, 2, 0), "shape": (3, 8, 10)}
    block = ops.dropout(0.4, keys, jnp.ones((2, 3, 5, 7)), **place)
    np.testing.assert_array_equal(block, whole[:, :, 2:7, :7])
