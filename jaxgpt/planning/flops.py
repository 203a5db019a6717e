"""Number of floating-point operations in a training step."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import Config
from jaxgpt.models import build_model, parameter_shapes


def step_flops(config: Config) -> int:
    """Floating-point operations of one update, forward and backward.

    Only matmuls count; the backward pass takes twice the operations of the forward
    pass. Attention counts all scores, including masked ones, whichever implementation
    runs. Recomputation (remat) does not count.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, which this equals for a GPT.
    """
    T, short = config.model.block_size, replace(config.model, block_size=2)
    params, apply = parameter_shapes(short), build_model(short, "cpu").apply

    def forward(tokens: int) -> int:  # FLOPs of one row, without dropout
        tokens_BT = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        return product_flops(jax.make_jaxpr(apply)({"params": params}, tokens_BT).jaxpr)

    # FLOPs are a T + b T^2, b from attention, so two lengths determine all others. At
    # lengths this short, no implementation of attention skips masked scores.
    one, two = forward(1), forward(2)
    return 3 * config.data.batch_size * (T * one + math.comb(T, 2) * (two - 2 * one))


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of a jaxpr's matmuls, including recomputed ones.

    The body of a scan counts once per iteration, unlike in XLA's own cost analysis.
    """
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            contracted = math.prod(left[axis] for axis in contracting)
            flops += 2 * equation.outvars[0].aval.size * contracted
        inner = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        )
        times = equation.params.get("length", 1)  # of a scan
        flops += times * sum(product_flops(a) for a in inner if hasattr(a, "eqns"))
    return flops
