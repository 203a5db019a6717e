from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PLATFORMS, TINY, changed, mesh_of
from jax.sharding import Mesh, PartitionSpec

from jaxgpt.ops import cross_entropy, head_loss_sum, head_losses
from jaxgpt.parallel.mesh import activation_sharding

MODULE = import_module("jaxgpt.ops.cross_entropy")  # the function has its name

B, T, C, V = 2, 12, 8, 50
RNG = np.random.default_rng(0)
WEIGHTS = [RNG.normal(size=s).astype(np.float32) for s in [(B, T, C), (V, C)]]
TARGETS_BT = RNG.integers(V, size=(B, T))
PARTS_BT = np.float32(RNG.integers(3, size=(B, T)) / (B * T))  # weights of losses


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    probs = np.array([[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]])
    losses = cross_entropy(jnp.log(probs) + 7, jnp.array([[1, 2]]))
    np.testing.assert_allclose(losses, -np.log([[0.5, 0.8]]), rtol=1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("at_once", "chunks"), [(2**23, 1), (384, 2), (1, T)])
def test_losses_and_gradients_in_chunks_are_those_of_all_logits(
    monkeypatch, at_once, chunks, platform
):
    larger = 4 if platform in MODULE.GPUS else 1
    monkeypatch.setattr(MODULE, "CHUNK_LOGITS", at_once / larger)

    def chunked(x_BTC, table_VC):
        losses_BT = head_losses(x_BTC, table_VC, TARGETS_BT, platform)
        loss = 3 * head_loss_sum(x_BTC, table_VC, TARGETS_BT, platform) / (B * T)
        loss += head_loss_sum(x_BTC, table_VC, TARGETS_BT, platform, PARTS_BT)
        return loss, losses_BT

    def whole(x_BTC, table_VC):
        logits_BTV = jnp.einsum("BTC,VC->BTV", x_BTC, table_VC)
        losses_BT = cross_entropy(logits_BTV, TARGETS_BT)
        return 3 * losses_BT.mean() + (losses_BT * PARTS_BT).sum(), losses_BT

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_size", [8192, 8200])
def test_the_kernel_equals_the_definition(monkeypatch, dtype, vocab_size):
    monkeypatch.setattr(MODULE, "BLOCK", 1024)
    rng = np.random.default_rng(1)
    padded = vocab_size + 56  # so that the last block is not full
    logits_BTV = jnp.array(8 * rng.normal(size=(1, 4, padded)) - 40, dtype)
    targets_BT = jnp.array([[0, 8191, vocab_size - 1, 77]])
    fused, plain = (
        form(logits_BTV, targets_BT, vocab_size)
        for form in (
            partial(MODULE._fused_losses_and_gradient, interpret=True),
            MODULE.plain_losses_and_gradient,
        )
    )
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-6)
    assert fused[1].dtype == dtype
    rounding = 5e-6 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(*(np.float32(a[1]) for a in (fused, plain)), rounding)


def head(x_BTC, table_VC, targets_BT, platform):
    """The mean of the losses, and the mean loss with its gradients."""

    def loss(*weights):
        return head_loss_sum(*weights, targets_BT, platform) / targets_BT.size

    losses_BT = head_losses(x_BTC, table_VC, targets_BT, platform)
    return losses_BT.mean(), *jax.value_and_grad(loss, argnums=(0, 1))(x_BTC, table_VC)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="then it needs a GPU")
def test_the_kernel_can_be_lowered_and_overwrites_the_logits():
    logits_BTV = jax.ShapeDtypeStruct((1, 4, 50304), jnp.bfloat16)
    targets_BT = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    kernel = partial(MODULE._fused_losses_and_gradient, vocab_size=50257)
    traced = jax.jit(kernel).trace(logits_BTV, targets_BT)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__gpu$xla.gpu.triton" in text
    assert "output_operand_alias<output_tuple_indices = [0]," in text


@pytest.fixture
def interpreted_kernel(monkeypatch):
    """Lets a CPU run the kernel, in blocks of which the vocabulary has two."""
    kernel = partial(MODULE._fused_losses_and_gradient, interpret=True)
    monkeypatch.setattr(MODULE, "_fused_losses_and_gradient", kernel)
    monkeypatch.setattr(MODULE, "BLOCK", 32)


def test_devices_call_the_kernel_for_their_own_positions(interpreted_kernel):
    config = changed(TINY, data={"batch_size": B}, mesh={"data": 2, "tensor": 2})
    with activation_sharding(mesh_of(config)):
        program = jax.jit(head, static_argnums=3).trace(*WEIGHTS, TARGETS_BT, "cuda")
    # Each kernel gets one of two rows, and half of its positions.
    assert f"f32[{T // 2},64]" in str(program.jaxpr)
    found, expected = (
        program.lower().compile()(*WEIGHTS, TARGETS_BT),
        head(*WEIGHTS, TARGETS_BT, "cpu"),
    )
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, found, expected)


def test_positions_that_do_not_divide_over_the_devices_need_no_kernel():
    config = changed(TINY, data={"batch_size": B}, mesh={"data": 1, "tensor": 8})
    logits_BTV = jnp.zeros((B, T, 8192))  # 12 positions over 8 devices
    with activation_sharding(mesh_of(config)):
        call = partial(MODULE.losses_and_gradient, vocab_size=8192, platform="cuda")
        losses_BT, _ = jax.jit(call)(logits_BTV, TARGETS_BT)
    np.testing.assert_allclose(losses_BT, np.log(8192), rtol=1e-6)


@pytest.mark.parametrize("check_vma", [False, True])
def test_the_kernel_runs_inside_shard_map(interpreted_kernel, check_vma):
    mesh = Mesh(np.array(jax.devices()[:2]), "rows")
    rows, whole = PartitionSpec("rows"), PartitionSpec()

    def gradient(x_BTC, table_VC, targets_BT):
        table_VC = jax.lax.pcast(table_VC, "rows", to="varying")  # as the step does
        return jax.grad(head_loss_sum)(x_BTC, table_VC, targets_BT, "cuda")

    specs = {"in_specs": (rows, whole, rows), "out_specs": rows}
    mapped = jax.shard_map(gradient, mesh=mesh, check_vma=check_vma, **specs)
    found = jax.jit(mapped)(*WEIGHTS, TARGETS_BT)
    expected = jax.grad(head_loss_sum)(*WEIGHTS, TARGETS_BT, "cpu")
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("platform", MODULE.GPUS)
def test_rounded_logits_have_the_loss_of_float32(platform):
    """As in GPT-2, all logits of a position are near -100, and vary by a few units."""
    rng, (B, T, C, V) = np.random.default_rng(2), (2, 256, 64, 512)
    x_BTC = jnp.array(rng.normal(size=(B, T, C)), jnp.bfloat16).at[..., 0].add(20)
    table_VC = jnp.array(0.3 * rng.normal(size=(V, C)), jnp.float32)
    table_VC = table_VC.at[:, 0].set(0.2 * table_VC[:, 0] - 5)
    targets_BT = rng.integers(V, size=(B, T))
    exact = head(x_BTC.astype(jnp.float32), table_VC, targets_BT, "cpu")
    rounded = head(x_BTC, table_VC, targets_BT, platform)
    np.testing.assert_allclose(rounded[:2], exact[:2], atol=2e-3)
    for found, expected in zip(rounded[2], exact[2], strict=True):
        error = np.abs(np.float32(found) - expected).max()
        assert error < 0.02 * np.abs(expected).max()
