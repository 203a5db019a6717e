"""The operations that the models are made of, fast on every platform.

A file has the plain definition of an operation, then the forms that are faster on one
platform, then the rule that picks one; every form equals the definition up to rounding.
`platform` names what the program will run on: "cpu", "tpu", "cuda" (NVIDIA GPUs from
Ampere on) or "gpu" (any other).
"""

from jaxgpt.ops.attention import (
    attention,
    attention_weights,
    cached_attention,
    update_cache,
)
from jaxgpt.ops.cross_entropy import cross_entropy, head_loss, head_losses
from jaxgpt.ops.dropout import dropout
from jaxgpt.ops.embedding import embed
from jaxgpt.ops.gelu import gelu
from jaxgpt.ops.matmul import einsum, unpack_qkv
