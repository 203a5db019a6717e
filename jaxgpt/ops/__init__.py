"""The operations of the models, with fast implementations for each platform.

Each file has the plain definition of an operation, then implementations that are faster
on some platform, then the function that picks one. All implementations equal the
definition up to rounding. `platform` is what the program will run on: "cpu", "tpu",
"cuda" (NVIDIA GPUs from Ampere on) or "gpu" (any other GPU).
"""

from jaxgpt.ops.attention import (
    attention,
    attention_weights,
    cached_attention,
    update_cache,
)
from jaxgpt.ops.cross_entropy import cross_entropy, head_loss_sum, head_losses
from jaxgpt.ops.dropout import dropout
from jaxgpt.ops.embedding import embed
from jaxgpt.ops.gelu import gelu
from jaxgpt.ops.matmul import einsum, project_qkv, unfused
