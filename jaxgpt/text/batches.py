"""Batches of tokens, as a pure function of a seed and a step.

B batch   T time (block_size)

A source maps (step, rows) to a batch, so a run can resume from its step alone, and
each process reads only its own rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxgpt.config import (
    ClassifierConfig,
    Config,
    MaskedLMConfig,
    RewardConfig,
    Seq2SeqConfig,
)
from jaxgpt.text.examples import (
    Examples,
    LabelledTexts,
    MaskedTexts,
    Preferences,
    Prompts,
    Sequences,
    TextPairs,
    bucketed_source,
)
from jaxgpt.text.packing import PackedDocuments, TokenRows, get_packed_batch
from jaxgpt.text.shards import Tokens

EVAL_SEED = 2**32  # seed of evaluation batches, above every training seed
_MIXTURE_SEED = 2**33  # added to the seed, so that sources draw other numbers

Split = TokenRows | Examples  # what batches are read from

# Maps completed steps, and a slice or an array of rows, to a pytree with those rows
# along axis 0.
Source = Callable[[int, slice | np.ndarray], Any]


def get_batch(
    tokens: np.ndarray | Tokens,
    seed: int,
    step: int,
    rows: slice | np.ndarray = slice(None),
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


def mixture(
    sources: Sequence[Source], weights: Sequence[float], seed: int, batch_size: int
) -> Source:
    """Returns a source of which each row is the same row of one of several sources.

    The others skip that row, so an epoch of packed documents has only a source's share
    of its rows.

    Args:
      sources: all have leaves of the same shape and dtype.
      weights: probability of each source, up to a factor.
      seed: with the step, the only source of randomness.
      batch_size: B.
    """
    shares = np.cumsum(weights)[:-1] / np.sum(weights)

    def read(step: int, rows: slice | np.ndarray = slice(None)) -> Any:
        rng = np.random.Generator(np.random.Philox(key=[_MIXTURE_SEED + seed, step]))
        which_B = np.searchsorted(shares, rng.random(batch_size), side="right")[rows]
        rows = np.arange(batch_size)[rows]
        parts = [source(step, rows[which_B == i]) for i, source in enumerate(sources)]
        place_B = np.argsort(np.argsort(which_B, kind="stable"))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[place_B], *parts)

    return read


def predictions(split: Split) -> int:
    """How many predictions an exact evaluation makes, or how many examples it reads.

    Each token of a split is predicted once: all of packed documents, and the answers
    of conversations.
    """
    if isinstance(split, Examples):
        return len(split)
    if isinstance(split, PackedDocuments):
        return int(split.counts.sum())
    return len(split) - 1


def training_source(split: Split | list[Any], config: Config) -> Source:
    """Returns the source of training batches.

    Rows of a split in parts are drawn from them by `data.weights`. Raises ValueError if
    packed documents have no end.
    """
    parts = split if isinstance(split, list) else [split]
    if any(isinstance(part, PackedDocuments) and not part.has_ends for part in parts):
        raise ValueError(
            "packing=documents needs an end-of-text token after each document, but the "
            "train split has none; give each document as a file of its own, or "
            "--data.packing windows"
        )
    group_size = config.grpo.group_size if config.grpo else 1
    return _source(split, config, config.train.seed, config.data.batch_size, group_size)


def evaluation_source(split: Split | list[Any], config: Config) -> Source:
    """Returns a source of microbatch-sized batches, the same in every evaluation.

    Rows of a split in parts are drawn as in training.
    """
    return _source(split, config, EVAL_SEED, config.data.microbatch_size)


def _source(
    split: Split | list[Any],
    config: Config,
    seed: int,
    batch_size: int,
    group_size: int = 1,
) -> Source:
    if isinstance(split, list):
        sources = [_source(part, config, seed, batch_size) for part in split]
        return mixture(sources, config.data.weights, seed, batch_size)
    if isinstance(split, PackedDocuments):
        return partial(get_packed_batch, split, seed, batch_size=batch_size)
    T = config.model.block_size
    if isinstance(split, Examples):
        return bucketed_source(split, seed, batch_size, T, group_size)
    return partial(get_batch, split, seed, batch_size=batch_size, block_size=T)


def longest_row(config: Config) -> Any:
    """A batch of one row, as long as any, for its shapes and dtypes."""
    model, T = config.model, config.model.block_size
    texts = Sequences(np.zeros(T, np.int32), np.array([0, T]))
    one, keys = np.zeros(1, np.int64), np.zeros((1, 2), np.uint64)
    pair = Sequences(np.zeros(2 * T, np.int32), np.array([0, T, 2 * T]))
    examples: Examples
    match model:
        case _ if config.rewarded:
            T -= config.rewarded.max_new_tokens
            examples = Prompts(Sequences(texts.tokens, np.array([0, T])))
        case RewardConfig():
            examples = Preferences(pair, one)
        case _ if config.dpo:
            examples = Preferences(pair, one)
        case ClassifierConfig():
            examples = LabelledTexts(texts, one.astype(np.int32), np.array([""]))
        case MaskedLMConfig():
            examples = MaskedTexts(texts, 0, 1, model.mask_prob)
        case Seq2SeqConfig():
            examples = TextPairs(texts, texts, 0)
        case _:
            # Inputs and targets, with segments, with parts.
            leaves = {"windows": 2, "documents": 3, "conversations": 4}
            count = leaves[config.data.packing] - config.data.learn_prompts
            return (np.zeros((1, T), np.int32),) * count
    return examples.read(one, T, np.ones(1, np.float32), keys)
