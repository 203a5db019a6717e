"""Number of floating-point operations in a training step."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import Config
from jaxgpt.models import build_model, input_shapes, parameter_shapes
from jaxgpt.text.batches import longest_row
from jaxgpt.text.examples import MaskedBatch, PreferenceBatch


def step_flops(config: Config) -> int:
    """Floating-point operations of one update, forward and backward.

    Every row has block_size tokens, and in an encoder-decoder as many of the source;
    batches of shorter texts take fewer operations.

    Only matmuls count; the backward pass takes twice the operations of the forward
    pass. Attention counts all scores, including masked ones, whichever implementation
    runs. Recomputation (remat) does not count.

    Source: Chowdhery et al. 2022 (PaLM), appendix B, which this equals for a GPT.
    """
    T, short = config.model.block_size, replace(config.model, block_size=3)
    params, apply = parameter_shapes(short), build_model(short, "cpu").apply
    row, predicted = longest_row(config), {}
    texts = 2 if isinstance(row, PreferenceBatch) else 1
    if isinstance(row, MaskedBatch):  # the head reads only these
        shape = row.positions_BK.shape
        predicted["positions_BK"] = jax.ShapeDtypeStruct(shape, jnp.int32)

    def forward(tokens: int) -> int:  # FLOPs of one row, without dropout
        inputs = input_shapes(short, tokens) | predicted
        jaxpr = jax.make_jaxpr(lambda p, a: apply({"params": p}, **a))(params, inputs)
        return product_flops(jaxpr.jaxpr)

    # FLOPs are a + b T + c T^2, c from attention, so three lengths determine all
    # others. At lengths this short, no implementation of attention skips masked scores.
    one, two, three = map(forward, (1, 2, 3))
    linear, quadratic = two - one, three - 2 * two + one
    forward_flops = one + (T - 1) * linear + math.comb(T - 1, 2) * quadratic
    return 3 * config.data.batch_size * texts * forward_flops


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
