"""How many floating-point operations a training step takes."""

import math
from typing import Any

import jax

from jaxgpt.config import Config
from jaxgpt.models import parameter_shapes


def step_flops(config: Config) -> int:
    """Floating-point operations that the model needs for one update, both passes.

    Per token: 6 for each parameter that multiplies, and 12 n_layer n_embd block_size
    for attention's scores and averages, masked ones too. An embedding is looked up; but
    the GPT's head multiplies with the tokens'. Recomputation (remat) is not counted.

    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    if config.model.architecture == "bigram":  # a look-up multiplies nothing
        return 0
    model = config.model
    params = parameter_shapes(model)
    multiplying = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key != "embedding" or path[0].key == "wte"
    )
    attention = 12 * model.n_layer * model.n_embd * model.block_size
    return config.data.batch_size * model.block_size * (6 * multiplying + attention)


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of a program's matrix products, recomputed ones too.

    A scan counts as often as it runs, which XLA's own analysis does not see.
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
