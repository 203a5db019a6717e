"""Token shards: their format, and many of them as one memory-mapped array.

A prepared folder holds, for each split, shards of whole documents, a tokenizer.json and
a manifest.json, which is written last. A shard `train_000.bin` is nanoGPT's format: raw
token ids, u16 or u32, an end-of-text token after each document. Beside it,
`train_000.ends` gives the position after each document's last token, raw u32.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxgpt.files import replace_file

FORMAT = 1  # of manifests
MANIFEST = "manifest.json"
ENDS_DTYPE = np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """A shard, as its folder's manifest describes it."""

    name: str  # of the token file; begins with the split
    tokens: int
    documents: int
    largest_token: int
    sha256: str  # of the token file

    @property
    def ends_name(self) -> str:
        """Name of the file of document ends."""
        return Path(self.name).with_suffix(".ends").name


@dataclass(frozen=True)
class Manifest:
    """What is known of a prepared folder without reading its tokens.

    Attributes:
      settings: the settings of `prepare` that decide what the shards hold.
      tokenizer: sha256 of tokenizer.json.
      vocab_size, end_of_text: the tokenizer's.
      sources: name, bytes, sha256, documents and skipped documents of each input file.
      documents: number of documents in the shards.
      duplicates: number of repeated documents that were dropped.
      shards: those of each split in order.
    """

    settings: dict[str, Any]
    tokenizer: str
    vocab_size: int
    end_of_text: int
    sources: list[dict[str, Any]]
    documents: int
    duplicates: int
    shards: list[Shard]

    def save(self, folder: Path) -> None:
        """Writes manifest.json, which makes the folder a corpus; it has no dates."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        text = json.dumps(values, indent=1) + "\n"
        replace_file(folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads manifest.json; raises OSError or ValueError that names the file."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
            if (found := values.pop("format")) == FORMAT:
                shards = [Shard(**shard) for shard in values.pop("shards")]
                return cls(shards=shards, **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); restore it, or prepare the corpus again"
            ) from error
        raise ValueError(f"{path} has format {found}, not {FORMAT}; update jaxgpt")

    def split(self, split: str) -> list[Shard]:
        """The shards of "train" or "val"."""
        return [shard for shard in self.shards if shard.name.startswith(split)]


def token_dtype(vocab_size: int) -> np.dtype:
    """Dtype of the token files: u16 as in nanoGPT, u32 for larger vocabularies."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-maps a raw array; raises ValueError if it ends within an element."""
    count, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise ValueError(f"{path} is truncated within a {dtype}; restore the file")
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


class Tokens:
    """Arrays of token ids, one after the other, as if they were one array.

    Attributes:
      dtype: that of the ids.
      ends: positions after each document's last token, one array for each of `arrays`,
        or None if they are not known.
    """

    def __init__(
        self, arrays: Sequence[np.ndarray], ends: Sequence[np.ndarray] | None = None
    ):
        """Takes arrays of ids [tokens], and the ends of documents in each."""
        self.arrays, self.ends = tuple(arrays), ends
        self.dtype = np.result_type(*arrays)
        self._stops = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """The ids at a slice, or at an array of positions from 0 to len - 1."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        shard = np.searchsorted(self._stops, index, side="right")
        ids = np.empty(np.shape(index), self.dtype)
        for i in np.unique(shard):
            start = self._stops[i] - len(self.arrays[i])
            ids[shard == i] = self.arrays[i][index[shard == i] - start]
        return ids

    def document_ends(self, end_of_text: int) -> np.ndarray:
        """Positions after each document's end-of-text token, i64 [documents].

        Tokens after the last such token are a document too. Reads all tokens if the
        ends are not known.
        """
        ends = self.ends or [np.flatnonzero(a == end_of_text) + 1 for a in self.arrays]
        starts = self._stops - [len(array) for array in self.arrays]
        found = [e.astype(np.int64) + s for e, s in zip(ends, starts, strict=True)]
        return np.union1d(np.concatenate(found), self._stops[self._stops > 0])


def open_shards(folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> Tokens:
    """Memory-maps shards of a folder, without reading them.

    Raises OSError if one is missing, ValueError if one has another size.
    """
    arrays, ends = [], []
    for shard in shards:
        arrays.append(map_file(folder / shard.name, dtype))
        ends.append(map_file(folder / shard.ends_name, ENDS_DTYPE))
        if (len(arrays[-1]), len(ends[-1])) != (shard.tokens, shard.documents):
            raise ValueError(
                f"{folder / shard.name} has not the {shard.tokens:,} tokens of "
                f"{shard.documents:,} documents that {MANIFEST} says; restore it, or "
                "prepare the corpus again"
            )
    return Tokens(arrays or [np.empty(0, dtype)], ends or [np.empty(0, ENDS_DTYPE)])
