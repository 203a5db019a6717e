"""Token shards: their format, and many of them as one memory-mapped array.

A prepared folder holds, for each split, shards of whole documents, a tokenizer.json and
a manifest.json, which is written last. A shard `train_000.bin` is nanoGPT's format: raw
token ids, u16 or u32, an end-of-text token after each document. Beside it,
`train_000.ends` gives the position after each document's last token, raw u32.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxgpt.files import replace_file
from jaxgpt.terminal import progress
from jaxgpt.text.scans import scan_once
from jaxgpt.text.tokenizer import token_dtype

SPLITS = ("train", "val")
FORMAT = 1  # of manifests
MANIFEST = "manifest.json"
ENDS_DTYPE = np.dtype("<u4")
_CHUNK = 1 << 22  # tokens scanned at once


@dataclass(frozen=True)
class Shard:
    """A shard, as its folder's manifest describes it."""

    name: str  # of the token file; begins with the split
    tokens: int
    documents: int
    largest_token: int
    sha256: str  # of the token file

    def __post_init__(self) -> None:
        numbers = self.tokens, self.documents, self.largest_token
        are_numbers = all(isinstance(number, int) for number in numbers)
        if not (re.fullmatch(r"(train|val)_\d+\.bin", self.name) and are_numbers):
            raise ValueError(f"{self} is not a shard")

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
      sources: name, bytes, sha256 (empty if it can't be read), documents and skipped
        documents of each input file. Dropped duplicates count too: the sum of documents
        is `documents` + `duplicates`.
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

    def __post_init__(self) -> None:
        if not isinstance(self.vocab_size, int):
            raise TypeError(f"vocab_size={self.vocab_size!r}")

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
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ) as error:
            raise ValueError(
                f"{path} is damaged ({error}); restore it, or prepare the corpus again"
            ) from error
        raise ValueError(f"{path} has format {found}, not {FORMAT}; update jaxgpt")

    def split(self, split: str) -> list[Shard]:
        """The shards of "train" or "val"."""
        return [shard for shard in self.shards if shard.name.startswith(split)]


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """Memory-maps a raw array.

    Raises FileNotFoundError if it is missing, ValueError if it ends within an element.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; restore it, or prepare the corpus again (a folder "
            f"without a {MANIFEST} needs train.bin and val.bin)"
        )
    count, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise ValueError(f"{path} is truncated within a {dtype}; restore the file")
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)


class Tokens:
    """Arrays of token ids, one after the other, as if they were one array.

    Attributes:
      dtype: that of the ids.
      ends: for each of `arrays`, the positions after its documents' last tokens. If
        they are not known, the path of its file, or None if it has none.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        ends: Sequence[np.ndarray | Path | None] | None = None,
    ):
        """Takes arrays of ids [tokens], at least one, and the ends of their documents.

        Without `ends`, they are not known.
        """
        self.arrays, self.ends = tuple(arrays), tuple(ends or [None] * len(arrays))
        self.dtype = np.result_type(*arrays)
        self._stops = np.cumsum([len(array) for array in arrays])
        self._starts = self._stops - [len(array) for array in arrays]

    @classmethod
    def join(cls, tokens: Sequence[Self]) -> Self:
        """The tokens of all, one after the other, without a copy."""
        arrays = [array for each in tokens for array in each.arrays]
        return cls(arrays, [ends for each in tokens for ends in each.ends])

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """The ids at a slice, or at an array of positions from 0 to len - 1.

        Consecutive positions, as in a window, are read as one piece.
        """
        if len(self.arrays) == 1:
            return self.arrays[0][index]
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        positions = np.ravel(index)
        cuts = np.flatnonzero(np.diff(positions) != 1) + 1
        begins = np.append(0, cuts)[: len(positions)]
        if (positions[begins] < 0).any():
            raise IndexError(f"a position is not from 0 to {len(self) - 1}")
        ids = np.empty(len(positions), self.dtype)
        first_arrays = np.searchsorted(self._stops, positions[begins], side="right")
        ends = np.append(cuts, len(positions))
        for i, begin, end in zip(first_arrays, begins, ends, strict=False):
            while begin < end:
                array, offset = self.arrays[i], positions[begin] - self._starts[i]
                piece = array[offset : offset + end - begin]
                ids[begin : begin + len(piece)] = piece
                begin += len(piece)
                i += 1
        return ids.reshape(np.shape(index))

    def document_ends(self, end_of_text: int) -> np.ndarray:
        """Positions after each document's end-of-text token, i64 [documents].

        Tokens after the last such token of an array are a document too. Reads the
        arrays whose ends are not known; those of files are kept in the cache.
        """
        found = []
        for array, ends, start in zip(
            self.arrays, self.ends, self._starts, strict=True
        ):
            if not isinstance(ends, np.ndarray):
                scan = partial(_scan_ends, array, end_of_text)
                name = f"ends {end_of_text}, {array.dtype}"
                ends = scan_once([ends], name, scan, is_array=True) if ends else scan()
            last = int(max(ends[-1:], default=0))
            if last > len(array) or (ends[1:] <= ends[:-1]).any():
                raise ValueError(
                    f"{getattr(ends, 'filename', 'a file of ends')} is damaged; "
                    "prepare the corpus again"
                )
            if len(array) > last:
                ends = np.append(ends, len(array))
            found.append(ends.astype(np.int64) + start)
        return np.concatenate(found)


def open_folder(folder: Path, vocab_size: int) -> tuple[dict[str, Tokens], str]:
    """Memory-maps the splits of a prepared folder, or of one of nanoGPT's.

    A prepared folder's tokens are not read; of others, one scan is kept in the cache.
    Returns the tokens by split, and the sha256 of manifest.json or of the token files.
    Raises OSError if a file is missing, ValueError if one has another size than the
    manifest says, or a token outside the vocabulary.
    """
    path = folder / MANIFEST
    if path.exists():
        manifest = Manifest.load(folder)
        dtype = token_dtype(manifest.vocab_size)
        tokens = {s: _open_shards(folder, manifest.split(s), dtype) for s in SPLITS}
        largest = {folder / s.name: s.largest_token for s in manifest.shards}
        sha256 = _sha256(path)
        own = folder / "tokenizer.json"
        if own.exists() and _sha256(own) != manifest.tokenizer:
            raise ValueError(
                f"{own} is not the tokenizer of these shards; restore it, or prepare "
                "the corpus again"
            )
    else:
        files, dtype = [folder / f"{s}.bin" for s in SPLITS], token_dtype(vocab_size)
        arrays = [map_file(file, dtype) for file in files]
        scan = partial(_scan, arrays)
        found = scan_once(files, f"tokens, {dtype}", scan)
        tokens = {
            split: Tokens([array], [file])
            for split, array, file in zip(SPLITS, arrays, files, strict=True)
        }
        largest = dict(zip(files, found["largest_tokens"], strict=True))
        sha256 = found["sha256"]
    for file, token in largest.items():
        if token >= vocab_size:
            raise ValueError(
                f"{file} has token {token}, outside the vocabulary of {vocab_size}; "
                f"use tokens of the model's tokenizer, or a vocab_size above {token}"
            )
    return tokens, sha256


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _open_shards(folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> Tokens:
    """Memory-maps shards; none are like an empty one."""
    arrays, ends = [np.empty(0, dtype)], [np.empty(0, ENDS_DTYPE)]
    for shard in shards:
        arrays.append(map_file(folder / shard.name, dtype))
        ends.append(map_file(folder / shard.ends_name, ENDS_DTYPE))
        if (len(arrays[-1]), len(ends[-1])) != (shard.tokens, shard.documents):
            raise ValueError(
                f"{folder / shard.name} has not the {shard.tokens:,} tokens of "
                f"{shard.documents:,} documents that {MANIFEST} says; restore it, or "
                "prepare the corpus again"
            )
    first = 1 if shards else 0
    return Tokens(arrays[first:], ends[first:])


def _scan(arrays: Sequence[np.ndarray]) -> dict[str, Any]:
    """Reads arrays once: the sha256 of all their bytes, and the largest id of each."""
    digest, largest_tokens = hashlib.sha256(), []
    with progress("reading the tokens", sum(map(len, arrays))) as advance:
        for array in arrays:
            largest = 0
            for start in range(0, len(array), _CHUNK):
                chunk = array[start : start + _CHUNK]
                digest.update(chunk.data)
                largest = max(largest, int(chunk.max()))
                advance(len(chunk))
            largest_tokens.append(largest)
    return {"sha256": digest.hexdigest(), "largest_tokens": largest_tokens}


def _scan_ends(array: np.ndarray, end_of_text: int) -> np.ndarray:
    """Reads an array once: the position after each end-of-text token, i64."""
    found = [np.empty(0, np.int64)]
    with progress("looking for the ends of documents", len(array)) as advance:
        for start in range(0, len(array), _CHUNK):
            chunk = array[start : start + _CHUNK]
            found.append(np.flatnonzero(chunk == end_of_text) + start + 1)
            advance(len(chunk))
    return np.concatenate(found)
