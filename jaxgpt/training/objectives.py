"""Objectives, which training minimises: functions of a batch that return loss sums.

B batch   T time   K labels, or masked positions   C n_embd   V vocab

An objective returns its loss and its other metrics by name, each as a weighted sum and
the sum of the weights. Both are added up over microbatches and devices before they are
divided, so that nothing is a mean of means, even if the weights differ. The metric
`tokens`, if there is one, is a count of tokens read instead of a mean.

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
from jaxgpt.config import DPOConfig
from jaxgpt.text.examples import (
    LabelledBatch,
    MaskedBatch,
    PairBatch,
    PreferenceBatch,
)

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

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a model's `apply`."""
        rngs = None if self.key is None else {"dropout": self.key}
        return {"deterministic": self.key is None, "rows_B": self.rows_B, "rngs": rngs}


Objective = Callable[[Any, Batch, Context], tuple[LossSum, dict[str, LossSum]]]


def validation_metric(objective: Objective) -> str:
    """Name of the evaluation metric that picks the best checkpoint; lower is better."""
    return f"val_{getattr(objective, 'metric', 'loss')}"


def next_token(model: nn.Module) -> Objective:
    """Makes the objective of next-token prediction: cross-entropy in nats.

    A batch is inputs and targets, i32 [B, T] each, and of packed rows also segments;
    those of padding are 0. Rows of conversations also have parts, which are 0 where a
    target does not count. The weight is the number of targets that count.
    """

    def objective(
        params: Any, batch: Batch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        inputs_BT, targets_BT, segments_BT = (*batch, None)[:3]
        counted_BT = batch[-1]  # the segments, or the parts
        apply = partial(model.apply, {"params": params}, inputs_BT, **context.options)
        weight, weights_BT = jnp.float32(targets_BT.size), None
        if segments_BT is not None:
            apply = partial(apply, segments_BT=segments_BT)
            weights_BT = (counted_BT > 0).astype(jnp.float32)
            weight = weights_BT.sum()
        if hasattr(model, "hidden"):
            head = model.head(params), targets_BT, model.platform, weights_BT
            total = ops.head_loss_sum(apply(method="hidden"), *head)
        else:
            total = ops.cross_entropy(apply(), targets_BT).sum()
        return LossSum(total, weight), {}

    return objective


def classification(model: nn.Module) -> Objective:
    """Makes the objective of classification: cross-entropy of the labels in nats.

    A batch is a `LabelledBatch`. The metric `accuracy` is the fraction of rows whose
    likeliest label is right, and `error` the rest, which picks the best checkpoint.
    """

    def objective(
        params: Any, batch: LabelledBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        inputs = batch.tokens_BT, batch.lengths_B
        logits_BK = model.apply({"params": params}, *inputs, **context.options)
        weights_B, count = batch.weights_B, batch.weights_B.sum()
        total = (ops.cross_entropy(logits_BK, batch.labels_B) * weights_B).sum()
        right_B = logits_BK.argmax(axis=-1) == batch.labels_B
        right = (right_B * weights_B).sum()
        metrics = {"accuracy": LossSum(right, count)}
        metrics["error"] = LossSum(count - right, count)
        return LossSum(total, count), metrics | _read(batch, context)

    objective.metric = "error"  # type: ignore[attr-defined] # the loss overfits first
    return objective


def masked_tokens(model: nn.Module) -> Objective:
    """Makes the objective of masked language modelling: cross-entropy in nats.

    A batch is a `MaskedBatch`; the loss is of the positions to predict. The metric
    `accuracy`, the fraction of them whose likeliest token is right, is of evaluations
    only, since training does not compute all logits.
    """

    def objective(
        params: Any, batch: MaskedBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        inputs = batch.tokens_BT, batch.lengths_B, batch.positions_BK
        apply = partial(model.apply, {"params": params}, **context.options)
        x_BKC, head_VC = apply(*inputs, method="hidden"), model.head(params)
        target = batch.targets_BK, model.platform, batch.weights_BK
        total = ops.head_loss_sum(x_BKC, head_VC, *target)
        metrics, count = _read(batch, context), batch.weights_BK.sum()
        if context.key is None:
            logits_BKV = model.apply({"params": params}, x_BKC, method="logits")
            right_BK = logits_BKV.argmax(axis=-1) == batch.targets_BK
            metrics["accuracy"] = LossSum((right_BK * batch.weights_BK).sum(), count)
        return LossSum(total, count), metrics

    return objective


def translation(model: nn.Module) -> Objective:
    """Makes the objective of translation by teacher forcing: cross-entropy in nats.

    A batch is a `PairBatch`. Training spreads a share `label_smoothing` of each
    target's probability evenly over the vocabulary; evaluations do not. Source: Szegedy
    et al. 2015, section 7.
    """
    smoothing = model.config.label_smoothing

    def objective(
        params: Any, batch: PairBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        apply = partial(model.apply, {"params": params}, **context.options)
        source = {"source_BS": batch.source_BS, "lengths_B": batch.lengths_B}
        x_BTC = apply(batch.inputs_BT, **source, method="hidden")
        head_VC, weights_BT = model.head(params), batch.weights_BT
        target = batch.targets_BT, model.platform, weights_BT
        total = ops.head_loss_sum(x_BTC, head_VC, *target)
        if smoothing and context.key is not None:
            # The target's logit minus the mean logit, without computing all logits.
            direction_BTC = head_VC[batch.targets_BT] - head_VC.mean(axis=0)
            excess_BT = (x_BTC.astype(jnp.float32) * direction_BTC).sum(axis=-1)
            total += smoothing * (excess_BT * weights_BT).sum()
        return LossSum(total, weights_BT.sum()), _read(batch, context)

    return objective


def pair_rewards(
    model: nn.Module, params: Any, batch: PreferenceBatch, context: Context
) -> Array:
    """A reward model's rewards of the texts of pairs, f32 [B, 2]."""
    (tokens_BT, lengths_B), options = _texts_of_pairs(batch, context)
    rewards_B = model.apply({"params": params}, tokens_BT, lengths_B, **options)
    return rewards_B.reshape(-1, 2)


def pair_log_probs(
    model: nn.Module, params: Any, batch: PreferenceBatch, context: Context
) -> Array:
    """A GPT's log-probabilities of the responses of pairs in nats, f32 [B, 2].

    They are sums over the tokens after the prompt.
    """
    (tokens_BT, lengths_B), options = _texts_of_pairs(batch, context)
    x_BTC = model.apply({"params": params}, tokens_BT, method="hidden", **options)
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    losses_BT = ops.head_losses(x_BTC, model.head(params), targets_BT, model.platform)
    target_T = jnp.arange(1, targets_BT.shape[1] + 1)
    first_B1 = jnp.repeat(batch.prompts_B, 2)[:, None]
    is_response_BT = (first_B1 <= target_T) & (target_T < lengths_B[:, None])
    return -jnp.where(is_response_BT, losses_BT, 0).sum(axis=1).reshape(-1, 2)


def _texts_of_pairs(
    batch: PreferenceBatch, context: Context
) -> tuple[tuple[Array, Array], dict[str, Any]]:
    """The 2 B texts of pairs and their lengths, and arguments of a model's `apply`."""
    rows_B = jnp.repeat(2 * context.rows_B, 2).at[1::2].add(1)
    tokens_BT = batch.tokens_B2T.reshape(-1, batch.tokens_B2T.shape[-1])
    texts = tokens_BT, batch.lengths_B2.reshape(-1)
    return texts, context._replace(rows_B=rows_B).options


def preference(model: nn.Module) -> Objective:
    """Makes the objective of a reward model: -log sigmoid(r_chosen - r_rejected).

    A batch is a `PreferenceBatch`. The metric `accuracy` is the fraction of pairs whose
    chosen text has the higher reward, and `margin` the mean of r_chosen - r_rejected.
    Source: Bradley and Terry 1952; Stiennon et al. 2020, section 3.4.
    """

    def objective(
        params: Any, batch: PreferenceBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        rewards_B2 = pair_rewards(model, params, batch, context)
        return _preference_losses(rewards_B2, batch, context)

    return objective


def dpo(model: nn.Module, beta: float) -> Objective:
    """Makes the objective of direct preference optimization.

    It is that of a reward model whose rewards are beta log(p / p_reference), where p is
    a response's probability; the batch has p_reference. Source: Rafailov et al. 2023,
    equation 7.
    """

    def objective(
        params: Any, batch: PreferenceBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        log_probs_B2 = pair_log_probs(model, params, batch, context)
        rewards_B2 = beta * (log_probs_B2 - batch.reference_B2)
        return _preference_losses(rewards_B2, batch, context)

    return objective


def _preference_losses(
    rewards_B2: Array, batch: PreferenceBatch, context: Context
) -> tuple[LossSum, dict[str, LossSum]]:
    """The losses of pairs by the rewards of their texts, and the metrics."""
    weights_B, count = batch.weights_B, batch.weights_B.sum()
    margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]

    def mean(x_B: Array) -> LossSum:
        return LossSum((x_B * weights_B).sum(), count)

    metrics = {"accuracy": mean(margin_B > 0), "margin": mean(margin_B)}
    if context.key is not None:
        read = (batch.lengths_B2.sum(axis=1) * weights_B).sum()
        metrics["tokens"] = LossSum(read, jnp.float32(1))
    return mean(nn.softplus(-margin_B)), metrics


def _read(batch: Any, context: Context) -> dict[str, LossSum]:
    """In training, how many tokens of texts or sources the model reads."""
    if context.key is None:
        return {}
    tokens = batch.lengths_B.sum().astype(jnp.float32)
    if isinstance(batch, PairBatch):
        tokens += batch.weights_BT.sum()
    return {"tokens": LossSum(tokens, jnp.float32(1))}


_OBJECTIVES = {
    "next-token": next_token,
    "classification": classification,
    "masked-tokens": masked_tokens,
    "translation": translation,
    "reward": preference,
}


def make_objective(model: nn.Module, settings: DPOConfig | None = None) -> Objective:
    """Makes the objective of the model's task, or of DPO if its settings are given."""
    if settings:
        return dpo(model, settings.beta)
    return _OBJECTIVES[model.config.task](model)
