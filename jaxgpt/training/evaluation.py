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
      standard_error: of that mean, in nats, from the spread between windows of
        block_size predictions (those within one have their context in common); None
        where there is but one window.
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

    Raises ValueError if `stride` is not from 1 to block_size.
    """
    T = config.model.block_size
    stride = T if stride is None else stride
    if not 1 <= stride <= T:
        raise ValueError(f"stride={stride} must be from 1 to block_size={T}")
    starts = np.arange(0, max(len(tokens) - 1 - T, 0) + stride, stride)
    batches = _windows(tokens, starts, config.data.rows_at_once, T)
    losses, new = [], T
    for loss_BT in _each_loss(eval_step, params, batches):
        for loss_T in loss_BT:
            losses.append(loss_T[T - new :])
            new = stride
    return _summary(np.concatenate(losses)[: len(tokens) - 1], T)


def _windows(
    tokens: np.ndarray, starts: np.ndarray, batch_size: int, block_size: int
) -> Iterator[Batch]:
    """Yields the windows from `starts` on, in batches that padding fills up."""
    for first in range(0, len(starts), batch_size):
        starts_B = np.resize(starts[first : first + batch_size], batch_size)
        positions = starts_B[:, None] + np.arange(block_size + 1)
        windows = tokens[np.minimum(positions, len(tokens) - 1)].astype(np.int32)
        yield windows[:, :-1], windows[:, 1:]


def _summary(losses: np.ndarray, block_size: int) -> Evaluation:
    """Mean and standard error of losses in the order of the text.

    The mean is a ratio, of the windows' sums to their sizes (the last may be smaller),
    and its variance that of a ratio.

    Source: Cochran, "Sampling Techniques" (1977), chapter 6.
    """
    cuts = np.arange(0, len(losses), block_size)
    sums = np.add.reduceat(losses, cuts)
    sizes = np.diff(cuts, append=len(losses))
    mean, count = losses.mean(), len(cuts)
    deviations = sums - mean * sizes
    error = None
    if count > 1:
        variance = np.sum(deviations**2) * count / (count - 1)
        error = float(np.sqrt(variance) / len(losses))
    return Evaluation(len(losses), float(mean), error)


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
