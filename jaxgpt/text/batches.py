"""Tokens become batches: a pure function of a seed and a step.

B batch   T time (block_size)
"""

import numpy as np

from jaxgpt.config import Config

EVAL_SEED = 2**32  # of the batches that every evaluation sees; no run's seed is as high


def batch(
    tokens: np.ndarray,
    seed: int,
    step: int,
    *,
    batch_size: int,
    block_size: int,
    rows: slice = slice(None),
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of the corpus, drawn uniformly, and what follows each of their tokens.

    Args:
      tokens: token ids of one split [tokens].
      seed, step: the only source of randomness.
      batch_size: B.
      block_size: T.
      rows: which of the B to read; all if left out.

    Returns inputs and targets, i32 [B, T]; targets_BT[:, t] == inputs_BT[:, t + 1].
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = rng.integers(len(tokens) - block_size, size=batch_size)[rows]
    windows = tokens[starts[:, None] + np.arange(block_size + 1)].astype(np.int32)
    return windows[:, :-1], windows[:, 1:]


def stack_batches(
    tokens: np.ndarray, steps: range, config: Config, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """The training batches of several steps, inputs and targets, i32 [steps, B, T].

    `rows` are those of each batch to read, as in `batch`.
    """
    batches = [
        batch(
            tokens,
            config.train.seed,
            step,
            batch_size=config.data.batch_size,
            block_size=config.model.block_size,
            rows=rows,
        )
        for step in steps
    ]
    inputs, targets = zip(*batches, strict=True)
    return np.stack(inputs), np.stack(targets)
