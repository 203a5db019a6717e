"""Products of two arrays of one dtype, summed in float32.

B batch   T time   K parts   H heads   D head_dim
"""

from functools import partial
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def plain_einsum(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """`jnp.einsum`, summed in float32 and returned in `dtype`."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def einsum(spec: str, a: Array, b: Array, dtype: Any, platform: str) -> Array:
    """`plain_einsum`, whose gradient is rounded to the operands' dtype before use.

    JAX alone would multiply bfloat16 operands by a gradient of float32.
    """
    # XLA:CPU orders contracted axes alphabetically; relabel them to avoid a transpose.
    letters = dict.fromkeys(filter(str.isalpha, spec))
    names = str.maketrans("".join(letters), ascii_lowercase[: len(letters)])
    if platform == "cpu":  # whose products of bfloat16 return float32
        return plain_einsum(spec.translate(names), a, b, dtype)
    # Devices that share a sum then exchange their parts of it in `dtype`.
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


def unpack_qkv(qkv_BTKHD: Array, platform: str) -> list[Array]:
    """The K arrays [B, T, H, D] that one product has made, as queries, keys, values."""
    K = qkv_BTKHD.shape[2]
    if platform == "cpu":  # where zero-padded gradients of slices take time to add up
        return [a[:, :, 0] for a in jnp.split(qkv_BTKHD, K, axis=2)]
    return [qkv_BTKHD[:, :, i] for i in range(K)]
