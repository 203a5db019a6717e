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

from jaxgpt.ops.matmul import einsum

# Maximum logits per row in memory at once. Without chunks, GPT-2 would need 200 MB per
# row (1,024 positions x 50,257 tokens), several times over.
CHUNK_LOGITS = 2**23


def cross_entropy(logits_BTV: Array, targets_BT: jax.typing.ArrayLike) -> Array:
    """-log softmax(logits) of the target token ids in nats, f32 [B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def head_losses(
    x_BTC: Array, table_VC: Array, targets_BT: jax.typing.ArrayLike, platform: str
) -> Array:
    """`cross_entropy` of the logits x @ table.T, one chunk of positions at a time.

    x is the input of the head, in the compute dtype; the table is its weights, f32.
    """
    V, table = len(table_VC), _padded(table_VC.astype(x_BTC.dtype), platform)

    def losses(chunk: tuple[Array, Array]) -> Array:
        return cross_entropy(_logits(chunk[0], table, V, platform), chunk[1])

    chunks = _chunks(x_BTC, V), _chunks(jnp.asarray(targets_BT), V)
    return _joined(jax.lax.map(losses, chunks))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_loss_sum(
    x_BTC: Array, table_VC: Array, targets_BT: Array, platform: str
) -> Array:
    """The sum of `head_losses`, f32 scalar.

    Computes each chunk's gradient with its loss; logits are not stored or recomputed.
    """
    return head_losses(x_BTC, table_VC, targets_BT, platform).sum()


def _loss_and_gradients(
    x_BTC: Array, table_VC: Array, targets_BT: Array, platform: str
) -> tuple[Array, Any]:
    dtype, V = x_BTC.dtype, len(table_VC)
    table = _padded(table_VC.astype(dtype), platform)

    def add(total: Any, chunk: tuple[Array, Array]) -> tuple[Any, Array]:
        x_BTC, chunk_targets_BT = chunk
        logits_BTV = _logits(x_BTC, table, V, platform)
        loss = cross_entropy(logits_BTV, chunk_targets_BT).sum()
        # XLA reuses the loss's logsumexp; jax.nn.softmax would read all logits again.
        log_sum_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
        grad_BTV = jnp.exp(logits_BTV - log_sum_BT1)
        grad_BTV -= jax.nn.one_hot(chunk_targets_BT, len(table))
        grad_BTV = grad_BTV.astype(dtype)
        grad_x_BTC = einsum("BTV,VC->BTC", grad_BTV, table, dtype, platform)
        grad_VC = einsum("BTV,BTC->VC", grad_BTV, x_BTC, jnp.float32, platform)
        return jax.tree.map(jnp.add, total, (loss, grad_VC)), grad_x_BTC

    zeros = jnp.zeros_like(table_VC, shape=()), jnp.zeros_like(table, table_VC.dtype)
    chunks = _chunks(x_BTC, V), _chunks(targets_BT, V)
    (loss, grad_VC), grad_x = jax.lax.scan(add, zeros, chunks)
    return loss, (_joined(grad_x), grad_VC[:V])


def _scale(_: str, gradients: Any, grad: Array) -> tuple[Array, Array, None]:
    grad_x_BTC, grad_VC = gradients
    return grad_x_BTC * grad.astype(grad_x_BTC.dtype), grad_VC * grad, None


head_loss_sum.defvjp(_loss_and_gradients, _scale)


def _padded(table_VC: Array, platform: str) -> Array:
    """On GPUs, pads V to a multiple of 64 for fast matmuls, as in nanoGPT."""
    missing = -len(table_VC) % 64 if platform in ("cuda", "gpu") else 0
    return jnp.pad(table_VC, ((0, missing), (0, 0)))


def _logits(x_BTC: Array, table_VC: Array, V: int, platform: str) -> Array:
    """The logits x @ table.T, with -inf for padding rows of the table."""
    logits_BTV = einsum("BTC,VC->BTV", x_BTC, table_VC, jnp.float32, platform)
    if len(table_VC) > V:
        logits_BTV = jnp.where(jnp.arange(len(table_VC)) < V, logits_BTV, -jnp.inf)
    return nn.with_logical_constraint(logits_BTV, ("batch", "time", "vocab"))


def _chunks(array: Array, vocab_size: int) -> Array:
    """Splits into strided chunks [N, B, T / N, ...], each sharded over all devices."""
    B, T, *rest = array.shape
    divisors = (n for n in range(1, T) if T % n == 0)
    fitting = (n for n in divisors if T // n * vocab_size <= CHUNK_LOGITS)
    count = next(fitting, T)
    return jnp.moveaxis(array.reshape(B, T // count, count, *rest), 2, 0)


def _joined(chunks: Array) -> Array:
    """The inverse of `_chunks`."""
    N, B, T, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 2).reshape(B, N * T, *rest)
