"""Matrix multiplication of two arrays of one dtype, accumulated in float32.

B batch   T time   K projections (q, k, v)   H heads   D head_dim
"""

from functools import partial
from string import ascii_lowercase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

GPUS = ("cuda", "gpu")


def plain_einsum(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """`jnp.einsum`, accumulated in float32 and returned in `dtype`."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum(spec: str, a: Array, b: Array, dtype: Any, platform: str) -> Array:
    """`plain_einsum`, with the incoming gradient cast to the operands' dtype.

    By default JAX would multiply bfloat16 operands by a float32 gradient.
    """
    # XLA:CPU orders contracted axes alphabetically; relabel them to avoid a transpose.
    letters = dict.fromkeys(filter(str.isalpha, spec))
    names = str.maketrans("".join(letters), ascii_lowercase[: len(letters)])
    if platform == "cpu":  # where bfloat16 matmuls return float32
        return plain_einsum(spec.translate(names), a, b, dtype)
    # If the contraction is sharded, devices then exchange partial sums in `dtype`.
    return jnp.einsum(spec.translate(names), a, b, preferred_element_type=dtype)


def _forward(*arguments: Any) -> tuple[Array, Any]:
    return einsum(*arguments), arguments[1:3]


def _backward(
    spec: str, _: Any, platform: str, operands: Any, grad: Array
) -> tuple[Array, Array]:
    (a, b), (axes, out) = operands, spec.split("->")
    axes_a, axes_b = axes.split(",")
    grad = grad.astype(a.dtype)
    grad_a = einsum(f"{out},{axes_b}->{axes_a}", grad, b, a.dtype, platform)
    grad_b = einsum(f"{axes_a},{out}->{axes_b}", a, grad, b.dtype, platform)
    return grad_a, grad_b


einsum.defvjp(_forward, _backward)


def project_qkv(x_BTC: Array, kernel_CKHD: Array, platform: str) -> list[Array]:
    """Projects x to K arrays [B, T, H, D] in its dtype: queries, keys and values."""
    K, constrain = kernel_CKHD.shape[1], nn.with_logical_constraint
    if platform in GPUS and x_BTC.shape[1] > 1:
        # Attention needs each in memory of its own: one matmul would need copies.
        spec, out = "BTC,CHD->BTHD", (x_BTC.dtype, platform)
        kernels = jnp.split(kernel_CKHD, K, axis=1)
        arrays = (einsum(spec, x_BTC, kernel[:, 0], *out) for kernel in kernels)
        names = ("batch", "time", "heads", "head_dim")
        return [constrain(array, names) for array in arrays]
    spec = "BTC,CKHD->BTKHD"
    joined_BTKHD = einsum(spec, x_BTC, kernel_CKHD, x_BTC.dtype, platform)
    qkv = ("batch", "time", "qkv", "heads", "head_dim")
    joined_BTKHD = constrain(joined_BTKHD, qkv)
    if platform == "cpu":  # where summing the zero-padded gradients of slices is slow
        return [a[:, :, 0] for a in jnp.split(joined_BTKHD, K, axis=2)]
    return [joined_BTKHD[:, :, i] for i in range(K)]


def unfused(y: Array, platform: str) -> Array:
    """Returns y, which XLA does not fuse with the addition to the residual stream.

    On GPUs XLA would let cuBLAS add y to a copy of the stream. After the matmul, the
    addition fuses with the LayerNorm that follows, and needs no copy.
    """
    return jax.lax.optimization_barrier(y) if platform in GPUS else y
