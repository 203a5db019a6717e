"""Packing: rows of whole documents or conversations, each predicted on its own.

B batch   T time (block_size)   P pieces   R rows

A document of n tokens, its end-of-text token included, has n predictions; the first is
made from the end-of-text token. Documents with more than T predictions are cut into
pieces, and the pieces are packed into rows of T by best-fit decreasing, so that little
of a row is padding. Source: Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", section 3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from jaxgpt.config import Config
from jaxgpt.text.examples import Examples
from jaxgpt.text.shards import Tokens
from jaxgpt.text.tokenizer import END_OF_TEXT, Tokenizer


@dataclass(frozen=True)
class PackedDocuments:
    """The documents or conversations of a split as rows. Pieces are sorted by row.

    Attributes:
      tokens: token ids of the split.
      end_of_text: id of the token that ends each document.
      block_size: T.
      has_ends: whether any document ends with `end_of_text`.
      starts_P: position of each piece's first target among the tokens.
      lengths_P: predictions in each piece.
      begins_P: whether the piece begins a document.
      offsets_R: index of each row's first piece, and the number of pieces, [R + 1].
      parts: of conversations, whose tokens are in the order of the pieces: what each
        token's prediction counts as, u8; 0 if it does not count. Else None: all count.
      conversations_P: of conversations, the index of each piece's.
    """

    tokens: np.ndarray | Tokens
    end_of_text: int
    block_size: int
    has_ends: bool
    starts_P: np.ndarray
    lengths_P: np.ndarray
    begins_P: np.ndarray
    offsets_R: np.ndarray
    parts: np.ndarray | None = None
    conversations_P: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets_R) - 1

    @cached_property
    def counts(self) -> np.ndarray:
        """Number of predictions in each row that count, i64 [R]."""
        counts_P = self.lengths_P
        if self.parts is not None:
            counts_P = np.add.reduceat(self.parts > 0, self.starts_P, dtype=np.int64)
        return np.add.reduceat(counts_P, self.offsets_R[:-1], dtype=np.int64)


TokenRows = np.ndarray | Tokens | PackedDocuments


def as_rows(
    tokens: TokenRows,
    config: Config,
    tokenizer: Tokenizer | None,
    log: Callable[[str], None],
) -> TokenRows:
    """The tokens of a split, packed if `data.packing` says so and they are not.

    Examples are returned as they are.

    Raises ValueError if they are to be packed and no token ends a document.
    """
    if config.data.packing == "windows" or isinstance(
        tokens, (PackedDocuments, Examples)
    ):
        return tokens
    if tokenizer is None or tokenizer.end_of_text is None:
        raise ValueError(
            f"packing=documents needs a tokenizer with {END_OF_TEXT}, which ends each "
            "document; use BPE, as in --data.tokenizer gpt2, or --data.packing windows"
        )
    T = config.model.block_size
    packed = pack_documents(tokens, tokenizer.end_of_text, T)
    log(
        f"packed {np.count_nonzero(packed.begins_P):,} documents into {len(packed):,} "
        f"rows, {len(tokens) / (len(packed) * T):.1%} full"
    )
    return packed


def pack_documents(
    tokens: np.ndarray | Tokens, end_of_text: int, block_size: int
) -> PackedDocuments:
    """Packs the documents of a split; a pure function of their lengths.

    Args:
      tokens: token ids, with `end_of_text` after each document. Tokens after the last
        one are a document too.
      block_size: T, the most predictions in a row.
    """
    source = tokens if isinstance(tokens, Tokens) else Tokens([tokens])
    ends = source.document_ends(end_of_text)
    begins = np.append(0, ends[:-1])
    counts = -(-(ends - begins) // block_size)  # pieces of each document
    document_P = np.repeat(np.arange(len(ends)), counts)
    cut_P = np.arange(len(document_P)) - (np.cumsum(counts) - counts)[document_P]
    starts_P = begins[document_P] + cut_P * block_size
    lengths_P = np.minimum(ends[document_P] - starts_P, block_size)
    lengths_P = lengths_P.astype(np.min_scalar_type(block_size))  # u16 sorts fastest
    rows_P = best_fit_decreasing(lengths_P, block_size)
    order = np.argsort(rows_P, kind="stable")
    offsets_R = np.append(0, np.cumsum(np.bincount(rows_P)))
    has_ends = any(tokens[end - 1] == end_of_text for end in ends)  # the first will do
    pieces = starts_P[order], lengths_P[order], cut_P[order] == 0
    return PackedDocuments(
        tokens, end_of_text, block_size, has_ends, *pieces, offsets_R
    )


def get_packed_batch(
    packed: PackedDocuments,
    seed: int,
    step: int,
    rows: slice | np.ndarray = slice(None),
    *,
    batch_size: int,
) -> tuple[np.ndarray, ...]:
    """Reads some rows of a batch. An epoch has all rows, in an order of its own.

    In a mixture, a part skips the rows of its epoch that are drawn from other parts.

    Args:
      seed, step: the only source of randomness.
      rows: which of the B rows to read; all by default.
      batch_size: B.

    Returns the result of `read_rows`.
    """
    number_B = step * batch_size + np.arange(batch_size)[rows]
    epoch_B, row_B = np.divmod(number_B, len(packed))
    for epoch in np.unique(epoch_B).tolist():
        order_R = _order(seed, epoch, len(packed))
        row_B = np.where(epoch_B == epoch, order_R[row_B], row_B)
    return read_rows(packed, row_B)


@lru_cache(maxsize=8)  # two epochs of each part of a mixture
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of the rows."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(rows)


def read_rows(packed: PackedDocuments, rows_B: np.ndarray) -> tuple[np.ndarray, ...]:
    """Reads rows by their index, as inputs, targets and segments, i32 [B, T].

    Pieces are segments 1, 2, ... of their row; the padding on the right is segment 0.
    If the rows have `parts`, those of the targets follow, i32 [B, T].
    """
    shape = len(rows_B), packed.block_size
    position_BT, begins_BT = np.zeros(shape, np.int64), np.zeros(shape, bool)
    segments_BT = np.zeros(shape, np.int32)
    for b, row in enumerate(rows_B):
        at = 0
        for i in range(*packed.offsets_R[row : row + 2]):
            start, length = packed.starts_P[i], int(packed.lengths_P[i])
            # Padding goes on with the last piece: consecutive tokens are read fastest.
            position_BT[b, at:] = np.arange(start, start + packed.block_size - at)
            segments_BT[b, at : at + length] = i - packed.offsets_R[row] + 1
            begins_BT[b, at] = packed.begins_P[i]
            at += length
    position_BT = np.minimum(position_BT, len(packed.tokens) - 1)
    targets_BT = np.where(segments_BT > 0, packed.tokens[position_BT], 0)
    inputs_BT = packed.tokens[np.maximum(position_BT - 1, 0)]
    inputs_BT = np.where(begins_BT, packed.end_of_text, inputs_BT)
    inputs_BT = np.where(segments_BT > 0, inputs_BT, 0)
    batch = inputs_BT.astype(np.int32), targets_BT.astype(np.int32), segments_BT
    if packed.parts is None:
        return batch
    parts_BT = np.where(segments_BT > 0, packed.parts[position_BT], 0)
    return *batch, parts_BT.astype(np.int32)


def best_fit_decreasing(lengths_P: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns each piece, longest first, to the fullest row with room; i32 [P].

    Rows with equal room are interchangeable, so pieces of equal length are placed many
    at a time: a row takes as many as it has room for, since each makes it fuller.

    Args:
      lengths_P: from 1 to `capacity`.
    """
    order = np.argsort(lengths_P, kind="stable")[::-1]
    rows_P, done, rows = np.empty(len(order), np.int32), 0, 0
    free: list[list[np.ndarray]] = [[] for _ in range(capacity)]  # rows by room
    counts = np.bincount(lengths_P, minlength=1)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        for room in range(length, capacity + 1):
            each = room // length
            needed = -(-left // each)
            if room == capacity:
                row_ids = np.arange(rows, rows + needed, dtype=np.int32)
                rows += needed
            elif free[room]:
                available = np.concatenate(free[room])
                row_ids, free[room] = available[:needed], [available[needed:]]
            else:
                continue
            placed = min(left, each * len(row_ids))
            rows_P[order[done : done + placed]] = np.repeat(row_ids, each)[:placed]
            done, left = done + placed, left - placed
            whole, rest = divmod(placed, each)
            free[room - each * length].append(row_ids[:whole])
            if rest:
                free[room - rest * length].append(row_ids[whole:])
            if not left:
                break
    return rows_P


def fill_rows(
    stretches: Sequence[Sequence[int]], systems: Sequence[int], capacity: int
) -> list[list[tuple[int, int, int]]]:
    """Cuts stretches of exchanges into pieces, and packs these into rows.

    A stretch that fits a row stays whole. A longer one, the longest first, fills rows
    with as many exchanges as fit. What is left of a row takes the next exchanges of
    others, or others that are whole, always those that fit best, until less than a
    sixteenth is left: to fill it too would separate more exchanges from their context.

    Args:
      stretches: lengths of the exchanges of each stretch, which follow each other.
      systems: length of each one's system turn, with which each piece begins.
      capacity: of a row; at least a system turn and any exchange after it.

    Returns pieces of each row: a stretch, its first exchange, and the one after the
    last.
    """
    totals = [sum(each) + systems[n] for n, each in enumerate(stretches)]
    done, rows = [0] * len(stretches), list[list[tuple[int, int, int]]]()
    # Stretches, each with the exchange its next piece begins with, by its length.
    waiting = [list[tuple[int, int]]() for _ in range(capacity + 1)]

    def wait(n: int) -> None:
        if done[n] < len(stretches[n]):
            least = systems[n] + stretches[n][done[n]]
            length = totals[n] if totals[n] <= capacity else least
            waiting[length].append((n, done[n]))

    for n in range(len(stretches)):
        wait(n)
    for longest in sorted(range(len(stretches)), key=totals.__getitem__, reverse=True):
        while done[longest] < len(stretches[longest]):
            rows.append([])
            room, fitting = capacity, [(longest, done[longest])]
            while fitting:
                n, start = fitting.pop()
                if start == done[n]:  # else a row began with it
                    room -= systems[n]
                    while done[n] < len(stretches[n]) and stretches[n][done[n]] <= room:
                        room -= stretches[n][done[n]]
                        done[n] += 1
                    rows[-1].append((n, start, done[n]))
                    wait(n)
                best = filter(None, reversed(waiting[: room + 1]))
                fitting = next(best, []) if 16 * room >= capacity else []
    return rows
