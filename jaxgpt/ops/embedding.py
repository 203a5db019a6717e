"""Embedding: token ids to rows of a table.

B batch   T time   C n_embd   V vocab
"""

from typing import Any

from jax import Array


def plain_embed(table_VC: Array, tokens_BT: Array, dtype: Any) -> Array:
    """The table's rows of the tokens in `dtype` [B, T, C]; gradients add up in float32.

    In bfloat16 a frequent token would lose most, and an H100 takes 200 times as long.
    """
    return table_VC[tokens_BT].astype(dtype)


def embed(table_VC: Array, tokens_BT: Array, dtype: Any, platform: str) -> Array:
    """`plain_embed`; TPUs add gradients in `dtype`, and exchange half the bytes."""
    if platform == "tpu":
        return table_VC.astype(dtype)[tokens_BT]
    return plain_embed(table_VC, tokens_BT, dtype)
