"""What training minimises.

B batch   T time   C n_embd   V vocab   N chunks of the time
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt import runtime
from jaxgpt.models.layers import constrain, einsum

# Logits of a row that are in memory at a time: a chunk of its positions has no more.
# GPT-2's 50,257 at each of 1,024 positions would be 200 MB a row, several times over.
LOGITS_AT_ONCE = 2**23


def token_losses(logits_BTV: jax.Array, targets_BT: jax.typing.ArrayLike) -> jax.Array:
    """Cross-entropy of each prediction in nats, f32 [B, T].

    Args:
      logits_BTV: f32.
      targets_BT: token ids, i32.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def head_losses(
    x_BTC: jax.Array, table_VC: jax.Array, targets_BT: jax.typing.ArrayLike
) -> jax.Array:
    """`token_losses` of the logits x @ table.T, a chunk of the time after the other.

    Args:
      x_BTC: what the head reads, in the compute dtype.
      table_VC: the head's weights, f32.
      targets_BT: token ids, i32.
    """
    V, table = len(table_VC), _aligned(table_VC.astype(x_BTC.dtype))

    def losses(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        x_BTC, targets_BT = chunk
        return token_losses(_logits(x_BTC, table, V), targets_BT)

    chunks = _chunks(x_BTC, len(table)), _chunks(jnp.asarray(targets_BT), len(table))
    return _whole(jax.lax.map(losses, chunks))


@jax.custom_vjp
def mean_head_loss(
    x_BTC: jax.Array, table_VC: jax.Array, targets_BT: jax.Array
) -> jax.Array:
    """The mean of `head_losses`, f32 scalar.

    Its gradients are made along with it, chunk by chunk, so that no chunk's logits are
    kept or made twice.
    """
    return head_losses(x_BTC, table_VC, targets_BT).mean()


def _loss_and_gradients(
    x_BTC: jax.Array, table_VC: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, Any]:
    dtype, V = x_BTC.dtype, len(table_VC)
    table = _aligned(table_VC.astype(dtype))

    def add(total: Any, chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        x_BTC, chunk_targets_BT = chunk
        logits_BTV = _logits(x_BTC, table, V)
        loss = token_losses(logits_BTV, chunk_targets_BT).sum()
        # By what the loss computes too; `jax.nn.softmax` would read all logits again.
        log_sum_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
        grad_BTV = jnp.exp(logits_BTV - log_sum_BT1)
        grad_BTV -= jax.nn.one_hot(chunk_targets_BT, len(table))
        grad_BTV = (grad_BTV / targets_BT.size).astype(dtype)
        grad_x_BTC = einsum("BTV,VC->BTC", grad_BTV, table, dtype)
        grad_VC = einsum("BTV,BTC->VC", grad_BTV, x_BTC)
        return jax.tree.map(jnp.add, total, (loss, grad_VC)), grad_x_BTC

    zeros = jnp.zeros_like(table_VC, shape=()), _aligned(jnp.zeros_like(table_VC))
    chunks = _chunks(x_BTC, V), _chunks(targets_BT, V)
    (loss, grad_VC), grad_x = jax.lax.scan(add, zeros, chunks)
    return loss / targets_BT.size, (_whole(grad_x), grad_VC[:V])


def _scale(gradients: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    grad_x_BTC, grad_VC = gradients
    return grad_x_BTC * grad.astype(grad_x_BTC.dtype), grad_VC * grad, None


mean_head_loss.defvjp(_loss_and_gradients, _scale)


def _aligned(table_VC: jax.Array) -> jax.Array:
    """The table as a GPU multiplies it fast: with a multiple of 64 rows.

    Source: nanoGPT model.py, whose vocabulary has 50,304 words for GPT-2's 50,257.
    """
    missing = -len(table_VC) % 64 if runtime.on_nvidia() else 0
    return jnp.pad(table_VC, ((0, missing), (0, 0)))


def _logits(x_BTC: jax.Array, table_VC: jax.Array, V: int) -> jax.Array:
    """Logits of all rows of the table; those that stand for no token are -inf."""
    logits_BTV = einsum("BTC,VC->BTV", x_BTC, table_VC)
    if len(table_VC) > V:
        logits_BTV = jnp.where(jnp.arange(len(table_VC)) < V, logits_BTV, -jnp.inf)
    return constrain(logits_BTV, ("batch", "time", "vocab"))


def _chunks(array: jax.Array, vocab_size: int) -> jax.Array:
    """Cuts [B, T, ...] into [N, B, T / N, ...], positions from all over the time.

    So devices that share the time share each chunk.
    """
    B, T, *rest = array.shape
    counts = (n for n in range(1, T) if T % n == 0)
    fitting = (n for n in counts if T // n * vocab_size <= LOGITS_AT_ONCE)
    count = next(fitting, T)
    return jnp.moveaxis(array.reshape(B, T // count, count, *rest), 2, 0)


def _whole(chunks: jax.Array) -> jax.Array:
    """The inverse of `_chunks`."""
    N, B, T, *rest = chunks.shape
    return jnp.moveaxis(chunks, 0, 2).reshape(B, N * T, *rest)
