"""What training minimises: an objective turns a batch into sums of losses.

B batch   T time

An objective returns its loss, and what else it reports by name, each as a sum over what
counts and how much that was. Sums add up over microbatches and devices, and only then
are divided: nothing is a mean of means, whatever counts where.

`best` is the checkpoint whose loss on the validation split is lowest; or another figure
that the objective reports, if its attribute `figure` has the name of that figure.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt import ops

Batch = Any  # a pytree of arrays whose axis 0 has the rows


class LossSum(NamedTuple):
    """A loss summed over what counts.

    Attributes:
      total: the sum, f32 scalar.
      weight: how much counts (tokens, examples), f32 scalar.
    """

    total: Array
    weight: Array

    def mean(self) -> Array:
        """Of all that counts; NaN where nothing does."""
        return self.total / self.weight


class Context(NamedTuple):
    """What an objective knows besides parameters and batch.

    Attributes:
      key: of dropout; None, as in evaluations, for none.
      rows_B: numbers of the rows in the whole batch, i32, which key their masks.
    """

    key: Array | None
    rows_B: Array


Objective = Callable[[Any, Batch, Context], tuple[LossSum, dict[str, LossSum]]]


def validation_metric(objective: Objective) -> str:
    """Which figure of an evaluation chooses the best checkpoint; lower is better."""
    return f"val_{getattr(objective, 'metric', 'loss')}"


def next_token(model: nn.Module) -> Objective:
    """The loss of each next token, in nats.

    Its batches are inputs and targets, i32 [B, T] each; every target counts.
    """

    def objective(
        params: Any, batch: Batch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        inputs_BT, targets_BT = batch
        apply = partial(
            model.apply,
            {"params": params},
            inputs_BT,
            deterministic=context.key is None,
            rows_B=context.rows_B,
            rngs=None if context.key is None else {"dropout": context.key},
        )
        if hasattr(model, "hidden"):
            x_BTC, head_VC = apply(method="hidden"), model.head(params)
            total = ops.head_loss(x_BTC, head_VC, targets_BT, model.platform)
        else:
            total = ops.cross_entropy(apply(), targets_BT).sum()
        return LossSum(total, jnp.float32(targets_BT.size)), {}

    return objective
