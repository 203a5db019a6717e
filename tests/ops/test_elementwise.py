"""Embedding, GELU, dropout and matrix products: every form is the definition."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgpt import ops
from jaxgpt.ops.dropout import random_bits

PLATFORMS = ("cpu", "tpu", "cuda", "gpu")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("spec", "shapes"),
    [
        ("BTC,CF->BTF", [(2, 5, 3), (3, 4)]),
        ("BTHD,HDC->BTC", [(2, 5, 3, 4), (3, 4, 6)]),
        ("BSHD,BTHD->BHTS", [(2, 7, 3, 4), (2, 5, 3, 4)]),
        ("BTV,BTC->VC", [(2, 5, 11), (2, 5, 3)]),
    ],
)
def test_einsum_and_its_gradients_are_jaxs_own(platform, spec, shapes):
    a, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))

    def total(product, a, b):
        return (product(spec, a, b) ** 2).sum()

    ours = partial(ops.einsum, dtype=jnp.float32, platform=platform)
    found, expected = (
        jax.value_and_grad(total, (1, 2))(product, a, b)
        for product in (lambda *args: ours(*args), jnp.einsum)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), found, expected)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_gradients_of_bfloat16_products_multiply_bfloat16_alone(platform):
    a, b = (jax.random.normal(jax.random.key(i), (64, 64)) for i in (0, 1))
    halves = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)

    def total(product, a, b):
        return (product(a, b) ** 2).sum()  # whose gradient is float32

    product = partial(ops.einsum, "TC,CF->TF", dtype=jnp.float32, platform=platform)
    gradient = jax.grad(lambda a, b: total(lambda *ab: product(*ab), a, b), (0, 1))
    for found, exact in zip(
        gradient(*halves),
        jax.grad(partial(total, jnp.matmul), (0, 1))(a, b),
        strict=True,
    ):
        assert found.dtype == jnp.bfloat16
        assert jnp.linalg.norm(found - exact) < 0.02 * jnp.linalg.norm(exact)
    text = jax.jit(gradient).lower(*halves).as_text()
    operands = re.findall(
        r"dot_general.*: \(tensor<\S+x(\w+)>, tensor<\S+x(\w+)>\)", text
    )
    assert len(operands) == 3
    assert set(operands) == {("bf16", "bf16")}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_products_of_bfloat16_are_summed_in_float32_and_rounded_once(platform):
    ones, twos = jnp.ones((1, 1000), jnp.bfloat16), jnp.full((1000, 1), 2, jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        product = ops.einsum("TC,CF->TF", ones, twos, dtype, platform)
        assert product.dtype == dtype
        assert product == 2000  # a sum in bfloat16 would stop at 512


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_a_frequent_token_counts_every_place_it_stands(platform, dtype):
    table_VC, tokens_BT = jnp.zeros((3, 2)), jnp.array([[1, 2] + [1] * 248])

    def total(table_VC):
        rows_BTC = ops.embed(table_VC, tokens_BT, dtype, platform)
        return rows_BTC.sum(dtype=jnp.float32)

    assert jax.grad(total)(table_VC).tolist() == [[0, 0], [249, 249], [1, 1]]
    drawn_VC = jax.random.normal(jax.random.key(0), (3, 2))
    found_BTC = ops.embed(drawn_VC, tokens_BT, dtype, platform)
    np.testing.assert_array_equal(found_BTC, drawn_VC.astype(dtype)[tokens_BT])


def test_only_tpus_add_embeddings_gradients_in_bfloat16():
    table_VC, tokens_BT = jnp.zeros((1, 1)), jnp.zeros((1, 1000), int)

    def gradient(platform):
        rows = partial(ops.embed, dtype=jnp.bfloat16, platform=platform)
        return jax.grad(lambda t: rows(t, tokens_BT).sum(dtype=jnp.float32))(table_VC)

    assert [gradient(p).item() for p in PLATFORMS] == [1000, 256, 1000, 1000]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("kind", "approximate"), [("exact", "none"), ("tanh", "tanh")])
def test_gelu_and_its_gradient_are_pytorchs(platform, kind, approximate):
    x = np.linspace(-12, 12, 1001, dtype=np.float32)
    theirs = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.gelu(theirs, approximate=approximate)
    y.sum().backward()
    ours = partial(ops.gelu, kind=kind, platform=platform)
    np.testing.assert_allclose(ours(jnp.array(x)), y.detach(), atol=2e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(ours))(x), theirs.grad, atol=5e-6)


def test_a_gpu_keeps_nothing_for_gelus_gradient_but_its_input():
    x = jax.random.normal(jax.random.key(0), (16, 16), jnp.bfloat16)

    def kept(platform):
        _, backward = jax.vjp(lambda x: ops.gelu(x, "exact", platform), x)
        return sum(each.nbytes for each in jax.tree.leaves(backward) if each.size > 1)

    assert kept("cuda") == kept("gpu") == x.nbytes < kept("cpu")


def test_random_bits_are_as_those_of_fair_coins():
    keys = jax.random.split(jax.random.key(1), 32)
    bits = np.asarray(random_bits(keys, (16, 64, 32), (), ()))
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


def test_a_block_of_a_row_drops_what_the_row_does():
    keys = jax.random.split(jax.random.key(1), 2)
    whole = ops.dropout(0.4, keys, jnp.ones((2, 3, 8, 10)))
    np.testing.assert_allclose(np.unique(whole), [0, 1 / 0.6])
    block = ops.dropout(
        0.4, keys, jnp.ones((2, 3, 5, 7)), start=(0, 2, 0), shape=(3, 8, 10)
    )
    np.testing.assert_array_equal(block, whole[:, :, 2:7, :7])
