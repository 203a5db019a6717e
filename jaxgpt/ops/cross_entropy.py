"""Cross-entropy of logits, or of a head whose logits would not fit in memory at once.

B batch   T time   C n_embd   V vocab   N chunks of positions
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxgpt.ops.matmul import GPUS, einsum
from jaxgpt.ops.sharding import per_device

# Maximum logits per row in memory at once. Without chunks, GPT-2 would need 200 MB per
# row (1,024 positions x 50,257 tokens), several times over.
CHUNK_LOGITS = 2**23

# `_fused_losses_and_gradient` is for large vocabularies, and reads this many at once.
BLOCK = 8192


def cross_entropy(logits_BTV: Array, targets_BT: jax.typing.ArrayLike) -> Array:
    """-log softmax(logits) of the target token ids in nats, f32 [B, T]."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def plain_losses_and_gradient(
    logits_BTV: Array, targets_BT: Array, vocab_size: int
) -> tuple[Array, Array]:
    """`cross_entropy` and its gradient by the logits, in their dtype.

    Ignores logits from vocab_size on, which belong to padding.
    """
    logits_BTV, dtype = _without_padding(logits_BTV, vocab_size), logits_BTV.dtype
    losses_BT = cross_entropy(logits_BTV, targets_BT)
    # XLA reuses the loss's logsumexp; jax.nn.softmax would read all logits again.
    log_sum_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    grad_BTV = jnp.exp(logits_BTV - log_sum_BT1)
    grad_BTV -= jax.nn.one_hot(targets_BT, logits_BTV.shape[-1])
    return losses_BT, grad_BTV.astype(dtype)


def _fused_losses_and_gradient(
    logits_BTV: Array, targets_BT: Array, vocab_size: int, interpret: bool = False
) -> tuple[Array, Array]:
    """`plain_losses_and_gradient`, which overwrites the logits by their gradient.

    One program per position reads its logits twice, the second time from the L2 cache,
    which has room for those of all running programs. XLA would read them three times.
    It needs Pallas's Triton backend, which jax 0.11 deprecates and still has.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    B, T, width = logits_BTV.shape

    def kernel(logits_ref: Any, target_ref: Any, grad_ref: Any, loss_ref: Any) -> None:
        def read(i: Array) -> tuple[Array, Any, Array]:
            token_V = i * BLOCK + jnp.arange(BLOCK)
            block = pl.ds(i * BLOCK, BLOCK)
            # Masked by the width, a multiple of 64, loads and stores are vectorised.
            logits_V = triton.load(logits_ref.at[block], mask=token_V < width)
            logits_V = jnp.where(token_V < vocab_size, logits_V, -jnp.inf)
            return token_V, block, logits_V.astype(jnp.float32)

        def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            (largest, total), (*_, logits_V) = sums, read(i)
            new = jnp.maximum(largest, logits_V.max())
            return new, total * jnp.exp(largest - new) + jnp.exp(logits_V - new).sum()

        def write(i: Array, target_logit: Array) -> Array:
            token_V, block, logits_V = read(i)
            hit_V = token_V == target_ref[...]
            grad_V = (jnp.exp(logits_V - log_sum) - hit_V).astype(grad_ref.dtype)
            triton.store(grad_ref.at[block], grad_V, mask=token_V < width)
            return target_logit + jnp.where(hit_V, logits_V, 0).sum()

        blocks, start = pl.cdiv(width, BLOCK), (jnp.float32(-jnp.inf), jnp.float32(0))
        largest, total = jax.lax.fori_loop(0, blocks, add, start)
        log_sum = largest + jnp.log(total)
        loss_ref[...] = log_sum - jax.lax.fori_loop(0, blocks, write, jnp.float32(0))

    logits = pl.BlockSpec((None, width), lambda position: (position, 0))
    scalar = pl.BlockSpec((None,), lambda position: (position,))
    grad, losses = pl.pallas_call(
        kernel,
        grid=(B * T,),
        in_specs=(logits, scalar),
        out_specs=(logits, scalar),
        out_shape=(
            jax.ShapeDtypeStruct((B * T, width), logits_BTV.dtype),
            jax.ShapeDtypeStruct((B * T,), jnp.float32),
        ),
        input_output_aliases={0: 0},
        # Few positions at a time, so that the L2 cache holds all their logits.
        compiler_params=triton.CompilerParams(num_warps=32),
        interpret=interpret,
        name="losses_and_gradient",
    )(logits_BTV.reshape(B * T, width), targets_BT.reshape(B * T))
    return losses.reshape(B, T), grad.reshape(B, T, width)


def losses_and_gradient(
    logits_BTV: Array, targets_BT: Array, vocab_size: int, platform: str
) -> tuple[Array, Array]:
    """`plain_losses_and_gradient`, by the fastest implementation."""
    call: Any = partial(plain_losses_and_gradient, vocab_size=vocab_size)
    if platform == "cuda" and vocab_size >= BLOCK:
        fused = partial(_fused_losses_and_gradient, vocab_size=vocab_size)
        call = per_device(fused, ("batch", "time"), targets_BT.shape) or call
    return call(logits_BTV, targets_BT)


def head_losses(
    x_BTC: Array, table_VC: Array, targets_BT: jax.typing.ArrayLike, platform: str
) -> Array:
    """`cross_entropy` of the logits x @ table.T, one chunk of positions at a time.

    x is the input of the head, in the compute dtype; the table is its weights, f32.
    """
    V, table = len(table_VC), _prepared(table_VC, x_BTC.dtype, platform)

    def losses(chunk: tuple[Array, Array]) -> Array:
        logits_BTV = _logits(chunk[0], table, platform)
        return cross_entropy(_without_padding(logits_BTV, V), chunk[1])

    chunks = (_chunks(a, V, platform) for a in (x_BTC, jnp.asarray(targets_BT)))
    return _joined(jax.lax.map(losses, tuple(chunks)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_loss_sum(
    x_BTC: Array,
    table_VC: Array,
    targets_BT: Array,
    platform: str,
    weights_BT: Array | None = None,
) -> Array:
    """The sum of `head_losses`, each times its weight if weights are given, f32 scalar.

    Computes each chunk's gradient with its loss; logits are not stored or recomputed.
    """
    losses_BT = head_losses(x_BTC, table_VC, targets_BT, platform)
    return (losses_BT if weights_BT is None else losses_BT * weights_BT).sum()


def _loss_and_gradients(
    x_BTC: Array,
    table_VC: Array,
    targets_BT: Array,
    platform: str,
    weights_BT: Array | None = None,
) -> tuple[Array, Any]:
    dtype, V = x_BTC.dtype, len(table_VC)
    table = _prepared(table_VC, dtype, platform)

    def add(total: Any, chunk: tuple[Array, Array, Any]) -> tuple[Any, Array]:
        x_BTC, chunk_targets_BT, chunk_weights_BT = chunk
        losses_BT, grad_BTV = losses_and_gradient(
            _logits(x_BTC, table, platform), chunk_targets_BT, V, platform
        )
        grad_BTV = grad_BTV.astype(dtype)
        grad_x_BTC = einsum("BTV,VC->BTC", grad_BTV, table, dtype, platform)
        if chunk_weights_BT is not None:  # scales arrays smaller than grad_BTV
            losses_BT *= chunk_weights_BT
            weights_BT1 = chunk_weights_BT[..., None].astype(dtype)
            grad_x_BTC, x_BTC = grad_x_BTC * weights_BT1, x_BTC * weights_BT1
        grad_VC = einsum("BTV,BTC->VC", grad_BTV, x_BTC, jnp.float32, platform)
        return jax.tree.map(jnp.add, total, (losses_BT.sum(), grad_VC)), grad_x_BTC

    zeros = jnp.zeros_like(table_VC, shape=()), jnp.zeros_like(table, table_VC.dtype)
    chunks = jax.tree.map(
        lambda a: _chunks(a, V, platform), (x_BTC, targets_BT, weights_BT)
    )
    (loss, grad_VC), grad_x = jax.lax.scan(add, zeros, chunks)
    return loss, (_joined(grad_x), grad_VC[:V])


def _scale(_: str, gradients: Any, grad: Array) -> tuple[Array, Array, None, None]:
    grad_x_BTC, grad_VC = gradients
    return grad_x_BTC * grad.astype(grad_x_BTC.dtype), grad_VC * grad, None, None


head_loss_sum.defvjp(_loss_and_gradients, _scale)


def _prepared(table_VC: Array, dtype: Any, platform: str) -> Array:
    """The table in the compute dtype, prepared for `_logits`.

    For GPUs, pads V to a multiple of 64, for fast matmuls as in nanoGPT. Also subtracts
    the mean row, which shifts all logits of a position equally, so that softmax does
    not change: `_logits` rounds them to `dtype`, and GPT-2's are up to -100 without it.
    """
    if platform not in GPUS:
        return table_VC.astype(dtype)
    table_VC = (table_VC - table_VC.mean(0)).astype(dtype)
    return jnp.pad(table_VC, ((0, -len(table_VC) % 64), (0, 0)))


def _logits(x_BTC: Array, table_VC: Array, platform: str) -> Array:
    """The logits x @ table.T, f32; on GPUs in the compute dtype, for half the bytes."""
    dtype = x_BTC.dtype if platform in GPUS else jnp.float32
    logits_BTV = einsum("BTC,VC->BTV", x_BTC, table_VC, dtype, platform)
    return nn.with_logical_constraint(logits_BTV, ("batch", "time", "vocab"))


def _without_padding(logits_BTV: Array, vocab_size: int) -> Array:
    """The logits, f32, with -inf from vocab_size on."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    if logits_BTV.shape[-1] == vocab_size:
        return logits_BTV
    real_V = jnp.arange(logits_BTV.shape[-1]) < vocab_size
    return jnp.where(real_V, logits_BTV, -jnp.inf)


def _chunks(array: Array, vocab_size: int, platform: str) -> Array:
    """Splits into strided chunks [N, B, T / N, ...], each sharded over all devices.

    On GPUs they are larger: each adds to the table's gradient in memory.
    """
    B, T, *rest = array.shape
    limit = CHUNK_LOGITS * (4 if platform in GPUS else 1)
    divisors = (n for n in range(1, T) if T % n == 0)
    fitting = (n for n in divisors if T // n * vocab_size <= limit)
    count = next(fitting, T)
    return jnp.moveaxis(array.reshape(B, T // count, count, *rest), 2, 0)


def _joined(chunks: Array) -> Array:
    """The inverse of `_chunks`."""
    N, B, T, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 2).reshape(B, N * T, *rest)
