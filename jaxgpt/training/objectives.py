"""Objectives, which training minimises: functions of a batch that return loss sums.

B batch   T time

An objective returns its loss and its other metrics by name, each as a weighted sum and
the sum of the weights. Both are added up over microbatches and devices before they are
divided, so that nothing is a mean of means, even if the weights differ.

The `best` checkpoint has the lowest loss on the validation split, or the lowest value
of another metric, if the objective has an attribute `metric` that names it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt import ops

Batch = Any  # a pytree of arrays with rows on axis 0


class LossSum(NamedTuple):
    """A sum of losses and its weight.

    Attributes:
      total: the sum, f32 scalar.
      weight: the number of tokens or examples in the sum, f32 scalar.
    """

    total: Array
    weight: Array

    def mean(self) -> Array:
        """The mean loss; NaN if the weight is 0."""
        return self.total / self.weight


class Context(NamedTuple):
    """The inputs of an objective besides parameters and batch.

    Attributes:
      key: the dropout key; None turns dropout off, as in evaluations.
      rows_B: indices of the rows in the whole batch, i32, which seed dropout masks.
    """

    key: Array | None
    rows_B: Array


Objective = Callable[[Any, Batch, Context], tuple[LossSum, dict[str, LossSum]]]


def validation_metric(objective: Objective) -> str:
    """Name of the evaluation metric that picks the best checkpoint; lower is better."""
    return f"val_{getattr(objective, 'metric', 'loss')}"


def next_token(model: nn.Module) -> Objective:
    """Makes the objective of next-token prediction: cross-entropy in nats.

    A batch is inputs and targets, i32 [B, T] each, and of packed rows also segments;
    those of padding are 0. The weight is the number of targets without padding.
    """

    def objective(
        params: Any, batch: Batch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        inputs_BT, targets_BT, segments_BT = (*batch, None)[:3]
        apply = partial(
            model.apply,
            {"params": params},
            inputs_BT,
            deterministic=context.key is None,
            rows_B=context.rows_B,
            rngs=None if context.key is None else {"dropout": context.key},
        )
        weight, weights_BT = jnp.float32(targets_BT.size), None
        if segments_BT is not None:
            apply = partial(apply, segments_BT=segments_BT)
            weights_BT = (segments_BT > 0).astype(jnp.float32)
            weight = weights_BT.sum()
        if hasattr(model, "hidden"):
            head = model.head(params), targets_BT, model.platform, weights_BT
            total = ops.head_loss_sum(apply(method="hidden"), *head)
        else:
            total = ops.cross_entropy(apply(), targets_BT).sum()
        return LossSum(total, weight), {}

    return objective
