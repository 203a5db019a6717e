"""Tokens become batches: a pure function of a seed and a step.

B batch   T time (block_size)

A source is a function of (step, rows) to a batch, so that a run needs no more than its
step to resume, and each process reads its own rows only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxgpt.config import Config

EVAL_SEED = 2**32  # of the batches that every evaluation sees; no run's seed is as high

# Completed steps, and which rows of the batch to read, to a pytree with rows on axis 0.
Source = Callable[[int, slice], Any]


def get_batch(
    tokens: np.ndarray,
    seed: int,
    step: int,
    rows: slice = slice(None),
    *,
    batch_size: int,
    block_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the corpus, drawn uniformly, and what follows each of their tokens.

    Args:
      tokens: token ids of one split [tokens].
      seed, step: the only source of randomness.
      rows: which of the B to read; all if left out.
      batch_size: B.
      block_size: T.

    Returns inputs and targets, i32 [B, T]; targets_BT[:, t] == inputs_BT[:, t + 1].
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = rng.integers(len(tokens) - block_size, size=batch_size)[rows]
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def training_source(tokens: np.ndarray, config: Config) -> Source:
    """The batches that a run trains on."""
    return partial(
        get_batch,
        tokens,
        config.train.seed,
        batch_size=config.data.batch_size,
        block_size=config.model.block_size,
    )


def evaluation_source(tokens: np.ndarray, config: Config) -> Source:
    """Batches of as many rows as run at once, the same in every evaluation."""
    return partial(
        get_batch,
        tokens,
        EVAL_SEED,
        batch_size=config.data.microbatch_size,
        block_size=config.model.block_size,
    )
