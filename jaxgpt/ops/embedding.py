"""Embedding: looks up the table row of each token id.

B batch   T time   C n_embd   V vocab
"""

from typing import Any

from jax import Array


def plain_embed(table_VC: Array, tokens_BT: Array, dtype: Any) -> Array:
    """Looks up rows, [B, T, C] in `dtype`, and sums their gradients in float32.

    In bfloat16 a frequent token's gradient is mostly lost, and an H100 is 200x slower.
    """
    return table_VC[tokens_BT].astype(dtype)


def embed(table_VC: Array, tokens_BT: Array, dtype: Any, platform: str) -> Array:
    """`plain_embed`; TPUs sum gradients in `dtype`, to communicate half the bytes."""
    if platform == "tpu":
        return table_VC.astype(dtype)[tokens_BT]
    return plain_embed(table_VC, tokens_BT, dtype)
