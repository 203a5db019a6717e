"""Examples: texts of unequal lengths, in batches padded on the right.

N examples   B batch   T time   S source time   K masked positions

An example's length falls into one of a few buckets, which are the lengths of batches,
so only a few programs compile. Padding changes no result: nothing attends to it, and
its weight in the loss is 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import numpy as np

_SMALLEST_BUCKET = 8
_ROW_SEED = 2**34  # added to the seed, so that rows and orders draw other numbers


@dataclass(frozen=True)
class Sequences:
    """Token ids of N texts.

    Attributes:
      tokens: all texts, one after the other.
      offsets: where each begins, and the end of the last, i64 [N + 1].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @classmethod
    def join(cls, texts: Iterable[Any]) -> Self:
        """Makes them of the token ids of each text."""
        arrays = [np.array(ids, np.int32) for ids in texts]
        offsets = np.cumsum([0, *map(len, arrays)])
        return cls(np.concatenate([np.zeros(0, np.int32), *arrays]), offsets)

    def select(self, keep_N: np.ndarray) -> Self:
        """The texts for which a boolean array is true."""
        lengths = self.lengths
        offsets = np.concatenate([[0], np.cumsum(lengths[keep_N])])
        return type(self)(self.tokens[np.repeat(keep_N, lengths)], offsets)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Token ids of one text."""
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text, i64."""
        return np.diff(self.offsets)

    def padded(self, row_B: np.ndarray, T: int) -> np.ndarray:
        """Texts padded with 0 on the right, i32 [B, T]."""
        start_B1, end_B1 = self.offsets[row_B, None], self.offsets[row_B + 1, None]
        position_BT = start_B1 + np.arange(T)
        tokens_BT = self.tokens[np.minimum(position_BT, len(self.tokens) - 1)]
        return np.where(position_BT < end_B1, tokens_BT, 0).astype(np.int32)


class LabelledBatch(NamedTuple):
    """Texts with the ids of their labels.

    Attributes:
      tokens_BT: token ids, i32.
      lengths_B: tokens in each row before the padding, i32.
      labels_B: i32.
      weights_B: 1, or 0 for rows that do not count, f32.
    """

    tokens_BT: Any
    lengths_B: Any
    labels_B: Any
    weights_B: Any


class MaskedBatch(NamedTuple):
    """Texts of which some tokens were replaced, and the original tokens.

    Attributes:
      tokens_BT: token ids, i32.
      lengths_B: tokens in each row before the padding, i32.
      positions_BK: positions to predict, i32.
      targets_BK: the original tokens there, i32.
      weights_BK: 1, or 0 for padding, f32.
    """

    tokens_BT: Any
    lengths_B: Any
    positions_BK: Any
    targets_BK: Any
    weights_BK: Any


class PairBatch(NamedTuple):
    """Sources, and targets of which each token is predicted from those before it.

    Attributes:
      source_BS: token ids of the sources, i32.
      lengths_B: tokens in each source before the padding, i32.
      inputs_BT: the end-of-text token and then the targets, i32.
      targets_BT: the targets, each with the end-of-text token at its end, i32.
      weights_BT: 1, or 0 for padding, f32.
    """

    source_BS: Any
    lengths_B: Any
    inputs_BT: Any
    targets_BT: Any
    weights_BT: Any


class PromptBatch(NamedTuple):
    """Prompts for a policy to continue.

    Attributes:
      tokens_BP: token ids, i32.
      lengths_B: tokens in each row before the padding, i32.
      weights_B: 1, or 0 for rows that do not count, f32.
      keys_B2: the data of each row's PRNG key, u32.
    """

    tokens_BP: Any
    lengths_B: Any
    weights_B: Any
    keys_B2: Any


class PreferenceBatch(NamedTuple):
    """Pairs of texts that begin with the same prompt: the chosen, then the rejected.

    Attributes:
      tokens_B2T: token ids, i32.
      lengths_B2: tokens in each text before the padding, i32.
      prompts_B: tokens in each prompt, i32.
      weights_B: 1, or 0 for rows that do not count, f32.
      reference_B2: log-probability of each response under the reference in nats, f32;
        0 if there is none.
    """

    tokens_B2T: Any
    lengths_B2: Any
    prompts_B: Any
    weights_B: Any
    reference_B2: Any


class Examples(ABC):
    """Examples of one task."""

    def __len__(self) -> int:
        """Number of examples, N."""
        return len(self.lengths)

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Tokens of each example's longest text, i64."""

    def buckets(self, block_size: int) -> np.ndarray:
        """Tokens in a row of the batches that each example is in, i64 [N]."""
        return bucket_of(self.lengths, block_size)

    @abstractmethod
    def read(
        self, row_B: np.ndarray, T: int, weights_B: np.ndarray, keys_B: np.ndarray
    ) -> Any:
        """Reads a batch of rows padded to T tokens.

        Args:
          row_B: indices of the examples.
          T: at least their lengths.
          weights_B: 1, or 0 for rows that do not count.
          keys_B: u64 [B, 2]; what is random in a row depends only on its key.
        """


@dataclass(frozen=True)
class LabelledTexts(Examples):
    """Texts to classify, which are given as `LabelledBatch`.

    Attributes:
      texts: each begins with the end-of-text token.
      labels_N: ids of the labels, i32.
      sources_N: where each text is from, str; "" if unknown.
    """

    texts: Sequences
    labels_N: np.ndarray
    sources_N: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text."""
        return self.texts.lengths

    def read(
        self, row_B: np.ndarray, T: int, weights_B: np.ndarray, keys_B: np.ndarray
    ) -> LabelledBatch:
        """See `Examples.read`; nothing is random."""
        return LabelledBatch(
            self.texts.padded(row_B, T),
            self.lengths[row_B].astype(np.int32),
            self.labels_N[row_B],
            weights_B,
        )


@dataclass(frozen=True)
class MaskedTexts(Examples):
    """Texts for masked language modelling, which are given as `MaskedBatch`.

    A fraction `mask_prob` of each text's tokens is predicted. Of these, 80% are
    replaced by the mask token, 10% by a random token, and 10% are kept. Source: BERT
    (Devlin et al. 2018), section 3.1; drawn anew each time, as in RoBERTa.

    Attributes:
      texts: each begins with the end-of-text token, which is never masked.
      mask_token: id of the mask token.
      vocab_size: random tokens are below it.
    """

    texts: Sequences
    mask_token: int
    vocab_size: int
    mask_prob: float

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text."""
        return self.texts.lengths

    def read(
        self, row_B: np.ndarray, T: int, weights_B: np.ndarray, keys_B: np.ndarray
    ) -> MaskedBatch:
        """See `Examples.read`; the masks are random."""
        tokens_BT = self.texts.padded(row_B, T)
        lengths_B = self.lengths[row_B].astype(np.int32)
        shape = len(row_B), self._predicted(T)
        positions_BK, targets_BK = np.zeros((2, *shape), np.int32)
        weights_BK = np.zeros(shape, np.float32)
        for b, length in enumerate(lengths_B.tolist()):
            rng = np.random.Generator(np.random.Philox(key=keys_B[b]))
            count = self._predicted(length)
            at = 1 + np.sort(rng.permutation(length - 1)[:count])
            count = len(at)  # 0 if the text is empty
            positions_BK[b, :count], targets_BK[b, :count] = at, tokens_BT[b, at]
            weights_BK[b, :count] = weights_B[b]
            kind = rng.random(count)
            random_tokens = rng.integers(self.vocab_size, size=count)
            replaced = np.where(kind < 0.8, self.mask_token, random_tokens)
            tokens_BT[b, at] = np.where(kind < 0.9, replaced, tokens_BT[b, at])
        return MaskedBatch(tokens_BT, lengths_B, positions_BK, targets_BK, weights_BK)

    def _predicted(self, length: int) -> int:
        """How many tokens of a text are predicted; at least one, if it has any."""
        return max(1, round(self.mask_prob * (length - 1)))


@dataclass(frozen=True)
class TextPairs(Examples):
    """Sources and targets to translate, which are given as `PairBatch`.

    Attributes:
      sources: each ends with the end-of-text token.
      targets: each ends with the end-of-text token.
    """

    sources: Sequences
    targets: Sequences
    end_of_text: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair's longer text."""
        return np.maximum(self.sources.lengths, self.targets.lengths)

    def read(
        self, row_B: np.ndarray, T: int, weights_B: np.ndarray, keys_B: np.ndarray
    ) -> PairBatch:
        """See `Examples.read`; nothing is random."""
        targets_BT = self.targets.padded(row_B, T)
        inputs_BT = np.roll(targets_BT, 1, axis=1)
        inputs_BT[:, 0] = self.end_of_text
        real_BT = np.arange(T) < self.targets.lengths[row_B, None]
        return PairBatch(
            self.sources.padded(row_B, T),
            self.sources.lengths[row_B].astype(np.int32),
            inputs_BT,
            targets_BT,
            (real_BT * weights_B[:, None]).astype(np.float32),
        )


@dataclass(frozen=True)
class Prompts(Examples):
    """Prompts for a policy to continue, which are given as `PromptBatch`.

    A batch has prompts of all lengths, so that it represents them all.
    """

    prompts: Sequences

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt."""
        return self.prompts.lengths

    def buckets(self, block_size: int) -> np.ndarray:
        """For all the length of the longest prompt, rounded up to a multiple of 8."""
        longest = -(-self.lengths.max() // 8) * 8
        return np.full(len(self), min(longest, block_size))

    def read(
        self, row_B: np.ndarray, T: int, weights_B: np.ndarray, keys_B: np.ndarray
    ) -> PromptBatch:
        """See `Examples.read`; the key of a row is that of its continuation."""
        words = [np.random.Philox(key=key).random_raw() for key in keys_B]
        return PromptBatch(
            self.prompts.padded(row_B, T),
            self.lengths[row_B].astype(np.int32),
            weights_B,
            np.array(words, np.uint64).view(np.uint32).reshape(-1, 2),
        )


@dataclass(frozen=True)
class Preferences(Examples):
    """Pairs of a chosen and a rejected text, which are given as `PreferenceBatch`.

    Attributes:
      texts: the chosen and the rejected text of each pair in turn, with its prompt.
      prompts_N: number of tokens of each pair's prompt.
      reference_N2: log-probability of each response under the reference in nats.
    """

    texts: Sequences
    prompts_N: np.ndarray
    reference_N2: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair's longer text."""
        return self.texts.lengths.reshape(-1, 2).max(axis=1)

    def read(
        self, row_B: np.ndarray, T: int, weights_B: np.ndarray, keys_B: np.ndarray
    ) -> PreferenceBatch:
        """See `Examples.read`; nothing is random."""
        text_B2 = 2 * row_B[:, None] + np.arange(2)
        reference_B2 = np.zeros(text_B2.shape, np.float32)
        if self.reference_N2 is not None:
            reference_B2 = self.reference_N2[row_B]
        return PreferenceBatch(
            self.texts.padded(text_B2.reshape(-1), T).reshape(len(row_B), 2, T),
            self.texts.lengths[text_B2].astype(np.int32),
            self.prompts_N[row_B].astype(np.int32),
            weights_B,
            reference_B2,
        )


def bucket_lengths(block_size: int) -> np.ndarray:
    """Lengths of batches: block_size, and an eighth, a quarter and a half of it."""
    shorter = [block_size // n for n in (8, 4, 2)]
    return np.array([n for n in shorter if n >= _SMALLEST_BUCKET] + [block_size])


def bucket_of(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """The smallest of `bucket_lengths` that each length fits."""
    buckets = bucket_lengths(block_size)
    return buckets[np.searchsorted(buckets, lengths)]


def row_keys(seed: int, numbers_B: np.ndarray) -> np.ndarray:
    """Keys of rows with these numbers, u64 [B, 2]."""
    return np.stack([np.full_like(numbers_B, seed), numbers_B], axis=1).astype("u8")


def bucketed_source(
    examples: Examples, seed: int, batch_size: int, block_size: int, group_size: int = 1
) -> Callable[..., Any]:
    """Returns a source of batches of one bucket each; see `batches.Source`.

    An epoch has every example once, and a few twice to fill its last batch. It is a
    random order, sorted by bucket and cut into batches, which follow each other in
    random order. (Runs of batches of one bucket would let several updates share a
    shape, but runs of ten cost `translate-de` a third of its progress.)

    Args:
      seed: with the step, the only source of randomness.
      batch_size: B.
      block_size: T of the longest batches.
      group_size: rows in turn that have the same example, with keys that differ.
    """
    B, bucket_N = batch_size, examples.buckets(block_size)
    batches = -(-len(examples) * group_size // B)

    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        """Rows of the epoch's batches, [batches, B]."""
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        order = np.resize(rng.permutation(len(examples)), batches * B // group_size)
        order = order[np.argsort(bucket_N[order], kind="stable")].repeat(group_size)
        return order.reshape(batches, B)[rng.permutation(batches)]

    def read(step: int, rows: slice | np.ndarray = slice(None)) -> Any:
        epoch, batch = divmod(step, batches)
        order_B = epoch_order(epoch)[batch]
        numbers_B = step * B + np.arange(B)[rows]
        row_B, T = order_B[rows], int(bucket_N[order_B].max())
        weights_B = np.ones(len(row_B), np.float32)
        return examples.read(row_B, T, weights_B, row_keys(_ROW_SEED + seed, numbers_B))

    return read
