"""The loss on text: a quick estimate during training, and the exact figure.

B batch   T time
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxgpt.config import Config
from jaxgpt.text.batches import EVAL_SEED, batch
from jaxgpt.text.corpus import Corpus
from jaxgpt.training.step import Batch, EvalStep


def estimate_losses(
    eval_step: EvalStep,
    corpus: Corpus,
    config: Config,
    params: Any,
    eval_iters: int | None = None,
) -> dict[str, float]:
    """Mean `train_loss` and `val_loss` in nats per token over `eval_iters` batches.

    The batches are the same in every evaluation, whatever the seed, so that evaluations
    compare. Without `eval_iters` there are `train.eval_iters`.
    """

    def batches(tokens: np.ndarray) -> Iterator[Batch]:
        for i in range(eval_iters or config.train.eval_iters):
            yield batch(
                tokens,
                EVAL_SEED,
                i,
                batch_size=config.data.rows_at_once,
                block_size=config.model.block_size,
            )

    def mean(tokens: np.ndarray) -> float:
        losses = _each_loss(eval_step, params, batches(tokens))
        return float(np.mean([loss_BT.mean() for loss_BT in losses]))

    return {"train_loss": mean(corpus.train), "val_loss": mean(corpus.val)}


@dataclass(frozen=True)
class Evaluation:
    """The exact loss on a text.

    Attributes:
      tokens: predictions it averages.
      nats_per_token: the mean loss.
      standard_error: of that mean, in nats, from the spread between stretches of
        block_size predictions, since those within one correlate; None where there is
        but one. Longer stretches still correlate a little, so it is a lower bound.
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
) -> Evaluation:
    """The loss on `tokens`, each but the first predicted exactly once.

    Windows of block_size predictions start every `stride` tokens, and of each the last
    `stride` predictions count (of the first all). So each has at least block_size -
    stride tokens before it, but for the text's first. The batch size does not change
    the result (but for rounding).

    Args:
      eval_step: as `compile_eval_step` makes it.
      params: the model's parameters.
      tokens: of one split [tokens], at least two.
      config: of the model, and of how many rows run at once.
      stride: block_size if left out: the windows then do not overlap.

    Raises ValueError if `stride` is not from 1 to block_size, and FloatingPointError if
    the loss is not finite.
    """
    T = config.model.block_size
    stride = T if stride is None else stride
    if not 1 <= stride <= T:
        raise ValueError(f"stride={stride} must be from 1 to block_size={T}")
    starts = np.arange(0, max(len(tokens) - 1 - T, 0) + stride, stride)
    batches = _windows(tokens, starts, config.data.rows_at_once, T)
    count, position = len(tokens) - 1, 0
    sums = np.zeros(-(-count // T))  # of each stretch of T losses, in the text's order
    for loss_BT in _each_loss(eval_step, params, batches):
        losses = loss_BT[:, T - stride :].ravel()
        if position == 0:
            losses = np.append(loss_BT[0, : T - stride], losses)
        losses = losses[: count - position]  # the rest is padding
        np.add.at(sums, (position + np.arange(len(losses))) // T, losses)
        position += len(losses)
    return _summary(sums, T, count)


def _windows(
    tokens: np.ndarray, starts: np.ndarray, batch_size: int, block_size: int
) -> Iterator[Batch]:
    """Yields the windows from `starts` on, in batches that padding fills up."""
    for first in range(0, len(starts), batch_size):
        starts_B = np.resize(starts[first : first + batch_size], batch_size)
        positions = starts_B[:, None] + np.arange(block_size + 1)
        windows = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int32)
        yield windows[:, :-1], windows[:, 1:]


def _summary(sums: np.ndarray, size: int, count: int) -> Evaluation:
    """Mean and standard error of `count` losses, from the sums of each `size` of them.

    The mean is a ratio, of the sums to their sizes (the last may be smaller), and its
    variance that of a ratio. Source: Cochran, "Sampling Techniques" (1977), chapter 6.
    """
    mean, error, n = sums.sum() / count, None, len(sums)
    if not np.isfinite(mean):
        raise FloatingPointError(
            f"the loss is {mean}: the parameters are no longer of use; take an earlier "
            "checkpoint"
        )
    if n > 1:
        sizes = np.minimum(size, count - size * np.arange(n))
        variance = np.sum((sums - mean * sizes) ** 2) * n / (n - 1)
        error = float(np.sqrt(variance) / count)
    return Evaluation(count, float(mean), error)


def _each_loss(
    eval_step: EvalStep, params: Any, batches: Iterable[Batch]
) -> Iterator[np.ndarray]:
    """Yields each batch's losses, f64 [B, T].

    Reads them one batch late, so that the device never waits; no later, since XLA's CPU
    client can deadlock with more than 32 programs under way on several devices.
    """
    running: list[jax.Array] = []
    for pair in batches:
        running.append(eval_step(params, pair))
        if len(running) > 1:
            yield np.asarray(running.pop(0), np.float64)
    for losses_BT in running:
        yield np.asarray(losses_BT, np.float64)
