"""The loss on text: a quick estimate during training, and the exact figure.

B batch   T time
"""

import math
from collections.abc import Iterable, Iterator
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


def exact_loss(
    eval_step: EvalStep, params: Any, tokens: np.ndarray, config: Config
) -> float:
    """Mean loss in nats per token, every token but the first predicted exactly once.

    The split is cut into consecutive windows of block_size predictions; within each the
    model looks back to the window's first token. The batch size does not change the
    result (but for rounding).

    Args:
      eval_step: as `compile_eval_step` makes it.
      params: the model's parameters.
      tokens: of one split [tokens].
      config: of the model, and of how many rows run at once.
    """
    shape = config.data.rows_at_once, config.model.block_size
    losses = _each_loss(eval_step, params, _windows(tokens, shape))
    count = len(tokens) - 1
    total, left = 0.0, count
    for loss_BT in losses:
        counted = loss_BT.ravel()[:left]  # the rest is padding
        total += float(counted.sum())
        left -= len(counted)
    return total / count


def _windows(tokens: np.ndarray, shape: tuple[int, int]) -> Iterator[Batch]:
    """Yields inputs and targets of `shape` [B, T]; the end is padded with token 0."""
    size = math.prod(shape)
    for start in range(0, len(tokens) - 1, size):
        piece = tokens[start : start + size + 1].astype(np.int32)
        piece = np.pad(piece, (0, size + 1 - len(piece)))
        yield piece[:-1].reshape(shape), piece[1:].reshape(shape)


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
