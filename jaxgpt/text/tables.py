"""Tables of examples: rows of strings from files, split by hash.

A row is (text, label, source) to classify, (text,) for masked language modelling,
(source, target) to translate, or the path's index and the texts of a conversation.
Tables are read whole.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import is_token_folder
from jaxgpt.files import not_utf8
from jaxgpt.text.scans import scan_once
from jaxgpt.text.tokenizer import CharTokenizer, Tokenizer, without_surrogates

SPLITS = ("train", "val", "test")
Row = tuple[str, ...]
Log = Callable[[str], None]


@dataclass(frozen=True)
class Table:
    """A table that may not have been read yet.

    Attributes:
      sha256: of its files and of the settings that choose rows of them.
      read: returns the rows, and the index in SPLITS of each.
    """

    sha256: str
    read: Callable[[], tuple[list[Row], np.ndarray]]


def split_of(key: str, fraction: float) -> int:
    """Index in SPLITS of what has a key: its hash as a number in [0, 1) decides.

    Below `fraction` it is in val, below twice as much in test.
    """
    digest = hashlib.sha256(key.encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return 1 if place < fraction else 2 if place < 2 * fraction else 0


def splits_of(keys: Sequence[str], fraction: float) -> np.ndarray:
    """`split_of` each key, u8 [N]."""
    return np.array([split_of(key, fraction) for key in keys], np.uint8)


def digest_files(paths: Sequence[Path]) -> str:
    """The sha256 of the bytes of files, one after the other."""

    def digest() -> str:
        sha256 = hashlib.sha256()
        for path in paths:
            sha256.update(path.read_bytes())
        return sha256.hexdigest()

    found: str = scan_once(paths, "examples", digest)
    return found


def join_digests(digests: Sequence[str]) -> str:
    """The only digest, or a digest of several."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_files(paths: Sequence[str], kinds: tuple[str, str]) -> list[Path]:
    """Returns the files; raises OSError or ValueError unless they are of these kinds.

    Args:
      kinds: suffixes of file names.
    """
    expected = (
        f"give {kinds[0]} or {kinds[1]} files, not compressed (use gunzip), and those "
        f"of a folder as FOLDER/*{kinds[0]}"
    )
    for path in paths:
        if is_token_folder(path):
            raise ValueError(
                f"{path} is a folder of tokens, which are for next-token models; "
                f"{expected}"
            )
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist; {expected}")
        if not Path(path).is_file() or Path(path).suffix.lower() not in kinds:
            raise ValueError(f"{path} can't be read as examples; {expected}")
    return [Path(path) for path in paths]


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark; keeps line breaks."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error


def read_objects(path: Path, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields "FILE:LINE" and the object of each line of JSONL that is not blank.

    It is empty if the line is other JSON. The options are those of `json.loads`. Raises
    ValueError with file and line if one is no JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line, **options)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: broken JSON: {error}") from error
            yield f"{path}:{number}", row if isinstance(row, dict) else {}


def read_jsonl(
    path: Path, required: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields "FILE:LINE" and the object of each line that is not blank.

    Numbers are kept as written. Raises ValueError with file and line if one lacks a
    required string or number.
    """
    numbers: Any = {"parse_float": str, "parse_int": str, "parse_constant": bool}
    for place, found in read_objects(path, **numbers):
        if wrong := [n for n in required if not isinstance(found.get(n), str)]:
            fields = ", ".join(f'"{name}": "..."' for name in required)
            raise ValueError(
                f"{place}: a line must be like {{{fields}}}, but its "
                f'"{wrong[0]}" is missing or no text'
            )
        strings = {
            name: without_surrogates(value)
            for name, value in found.items()
            if isinstance(value, str)
        }
        yield place, strings


def without_blank(rows: Sequence[Row], texts: int, name: str, log: Log) -> list[Row]:
    """The rows whose first `texts` texts have more than whitespace; logs the others.

    Raises ValueError if none has.
    """
    kept = [row for row in rows if all(text.strip() for text in row[:texts])]
    if not kept:
        raise ValueError(f"{name}: the corpus is empty")
    if len(kept) < len(rows):
        blank = len(rows) - len(kept)
        log(
            f"{name}: {blank:,} of {len(rows):,} examples are left out: a text is empty"
        )
    return kept


def encode_known(
    texts: Sequence[str], tokenizer: Tokenizer, log: Log | None
) -> list[np.ndarray]:
    """Token ids of each text, without characters that a CharTokenizer does not have."""
    if isinstance(tokenizer, CharTokenizer):
        unknown = set("".join(texts)) - set(tokenizer.characters)
        if unknown and log:
            log(
                "left out: characters that the training part does not have, "
                f"{''.join(sorted(unknown))!r:.80}"
            )
        table = dict.fromkeys(map(ord, unknown))
        texts = [text.translate(table) for text in texts]
    return tokenizer.encode_batch(texts)
