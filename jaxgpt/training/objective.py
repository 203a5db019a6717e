"""What training minimises.

B batch   T time   V vocab
"""

import jax
import optax


def token_losses(logits_BTV: jax.Array, targets_BT: jax.typing.ArrayLike) -> jax.Array:
    """Cross-entropy of each prediction in nats, f32 [B, T].

    Args:
      logits_BTV: f32.
      targets_BT: token ids, i32.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
