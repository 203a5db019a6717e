"""The loss on a text: a quick estimate during training, and the exact value.

B batch   T time
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt import ops
from jaxgpt.config import Config
from jaxgpt.parallel.feeding import shard_batch
from jaxgpt.parallel.mesh import activation_sharding, replicated
from jaxgpt.text.batches import Source
from jaxgpt.training.objectives import Batch, Context, LossSum, Objective

# Maps sharded parameters and a batch (in full on every process) to results on every
# process.
EvalStep = Callable[[Any, Batch], Any]


def make_eval_step(objective: Objective, mesh: Mesh) -> EvalStep:
    """Makes the `EvalStep` of an objective's loss and metrics, without dropout."""

    def metrics(params: Any, batch: Batch) -> dict[str, LossSum]:
        rows_B = jnp.arange(len(jax.tree.leaves(batch)[0]))
        loss, metrics = objective(params, batch, Context(None, rows_B))
        return {"loss": loss, **metrics}

    return _compile(metrics, mesh)


def make_losses_step(model: nn.Module, mesh: Mesh) -> EvalStep:
    """Makes the `EvalStep` of next-token losses, f32 [B, T] in nats; no dropout."""

    def losses(params: Any, batch: Batch) -> jax.Array:
        (inputs_BT, targets_BT), apply = batch, partial(model.apply, {"params": params})
        if hasattr(model, "hidden"):
            x_BTC, head_VC = apply(inputs_BT, method="hidden"), model.head(params)
            return ops.head_losses(x_BTC, head_VC, targets_BT, model.platform)
        return ops.cross_entropy(apply(inputs_BT), targets_BT)

    return _compile(losses, mesh)


def _compile(function: EvalStep, mesh: Mesh) -> EvalStep:
    jitted = jax.jit(function, out_shardings=replicated(mesh))

    def eval_step(params: Any, batch: Batch) -> Any:
        with activation_sharding(mesh):
            return jitted(params, shard_batch(mesh, batch))

    return eval_step


def estimate(
    eval_step: EvalStep, sources: dict[str, Source], params: Any, batches: int
) -> dict[str, float]:
    """Means of an objective's loss and metrics over `batches` batches of each source.

    Args:
      eval_step: the result of `make_eval_step`.
      sources: by name, which prefixes the metrics: "val" gives `val_loss` and so on.
      params: the model's parameters.
      batches: number per source. Raises ValueError if a metric's total weight is 0.
    """
    means = {}
    for name, source in sources.items():
        total: Any = None
        steps = (source(step, slice(None)) for step in range(batches))
        for sums in _each(eval_step, params, steps):
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        for metric, loss in total.items():
            if not loss.weight:
                raise ValueError(
                    f"{name}_{metric} has weight 0 in {batches} batches; increase "
                    "--train.eval-iters"
                )
            means[f"{name}_{metric}"] = float(loss.mean())
    return means


@dataclass(frozen=True)
class Evaluation:
    """The exact loss on a text.

    Attributes:
      tokens: number of predictions.
      nats_per_token: their mean loss.
      standard_error: of that mean, in nats, from the variance between segments of
        block_size predictions, since losses within one correlate; None if there is only
        one. A lower bound, because losses correlate a little between segments too.
    """

    tokens: int
    nats_per_token: float
    standard_error: float | None


def evaluate_exactly(
    eval_step: EvalStep,
    params: Any,
    tokens: np.ndarray,
    config: Config,
    stride: int | None = None,
    advance: Callable[[int], object] = lambda predictions: None,
) -> Evaluation:
    """The loss on `tokens`, predicting each one but the first exactly once.

    Windows of block_size predictions start every `stride` tokens. Only the last
    `stride` predictions of a window count, and all of the first window, so that each
    has more than block_size - stride tokens of context, except at the start of the
    text. The batch size does not change the result, except for rounding.

    Args:
      eval_step: the result of `make_losses_step`.
      params: the model's parameters.
      tokens: token ids of one split [tokens], at least two.
      config: gives block_size and the number of rows per batch.
      stride: block_size by default, so that windows do not overlap.
      advance: called with the number of predictions of each batch, to show progress.

    Raises ValueError if `stride` is not from 1 to block_size, and FloatingPointError if
    the loss is not finite.
    """
    T = config.model.block_size
    stride = T if stride is None else stride
    if not 1 <= stride <= T:
        raise ValueError(f"stride={stride} must be from 1 to block_size={T}")
    starts = np.arange(0, max(len(tokens) - 1 - T, 0) + stride, stride)
    batches = _windows(tokens, starts, config.data.microbatch_size, T)
    count, position = len(tokens) - 1, 0
    sums = np.zeros(-(-count // T))  # of each segment of T losses, in text order
    for loss_BT in _each(eval_step, params, batches):
        losses = loss_BT[:, T - stride :].ravel()
        if position == 0:
            losses = np.append(loss_BT[0, : T - stride], losses)
        losses = losses[: count - position]  # the rest is padding
        np.add.at(sums, (position + np.arange(len(losses))) // T, losses)
        position += len(losses)
        advance(len(losses))
    return _summary(sums, T, count)


def _windows(
    tokens: np.ndarray, starts: np.ndarray, batch_size: int, block_size: int
) -> Iterator[Batch]:
    """Yields batches of the windows at `starts`, and repeats some to fill the last."""
    for first in range(0, len(starts), batch_size):
        starts_B = np.resize(starts[first : first + batch_size], batch_size)
        positions = starts_B[:, None] + np.arange(block_size + 1)
        windows = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int32)
        yield windows[:, :-1], windows[:, 1:]


def _summary(sums: np.ndarray, size: int, count: int) -> Evaluation:
    """Mean and standard error of `count` losses, given the sum of each `size` of them.

    The last segment may be smaller, so the variance is that of a ratio estimator.
    Source: Cochran, "Sampling Techniques" (1977), chapter 6.
    """
    mean, error, n = sums.sum() / count, None, len(sums)
    if not np.isfinite(mean):
        raise FloatingPointError(
            f"the loss is {mean}: the parameters are invalid; use an earlier checkpoint"
        )
    if n > 1:
        sizes = np.minimum(size, count - size * np.arange(n))
        variance = np.sum((sums - mean * sizes) ** 2) * n / (n - 1)
        error = float(np.sqrt(variance) / count)
    return Evaluation(count, float(mean), error)


def _each(eval_step: EvalStep, params: Any, batches: Iterable[Batch]) -> Iterator[Any]:
    """Yields the result of `eval_step` for each batch, f64 on the host.

    Reads each result one batch late, so that the device never waits; no later, because
    XLA's CPU client can deadlock with more than 32 programs in flight on many devices.
    """
    running: list[Any] = []
    to_host = partial(jax.tree.map, partial(np.asarray, dtype=np.float64))
    for batch in batches:
        running.append(eval_step(params, batch))
        if len(running) > 1:
            yield to_host(running.pop(0))
    for last in running:
        yield to_host(last)
