"""Batches of tokens, as a pure function of a seed and a step.

B batch   T time (block_size)

A source maps (step, rows) to a batch, so a run can resume from its step alone, and
each process reads only its own rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxgpt.config import Config

EVAL_SEED = 2**32  # seed of evaluation batches, above every training seed

# Maps completed steps and a slice of rows to a pytree with those rows along axis 0.
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
    """Samples windows of the corpus uniformly, as inputs and next-token targets.

    Args:
      tokens: token ids of one split [tokens].
      seed, step: the only source of randomness.
      rows: which of the B rows to read; all by default.
      batch_size: B.
      block_size: T.

    Returns inputs and targets, i32 [B, T]; targets_BT[:, t] == inputs_BT[:, t + 1].
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = rng.integers(len(tokens) - block_size, size=batch_size)[rows]
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def training_source(tokens: np.ndarray, config: Config) -> Source:
    """Returns the source of training batches."""
    return partial(
        get_batch,
        tokens,
        config.train.seed,
        batch_size=config.data.batch_size,
        block_size=config.model.block_size,
    )


def evaluation_source(tokens: np.ndarray, config: Config) -> Source:
    """Returns a source of microbatch-sized batches, the same in every evaluation."""
    return partial(
        get_batch,
        tokens,
        EVAL_SEED,
        batch_size=config.data.microbatch_size,
        block_size=config.model.block_size,
    )
