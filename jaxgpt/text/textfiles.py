"""Text files: split 90/10 by position, and tokenized into the cache.

Each of several files is a document. Token files have nanoGPT's format, raw uint16
(uint32 for more than 65,536 tokens), and are memory-mapped, so neither the text nor its
tokens need to fit in memory.
"""

import codecs
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.files import delete_abandoned, not_utf8, replace_file, temporary
from jaxgpt.start import cache_dir
from jaxgpt.terminal import progress
from jaxgpt.text import pretrained
from jaxgpt.text.scans import scan_once
from jaxgpt.text.shards import SPLITS, Tokens, map_file
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    codepoints,
    load_tokenizer,
    token_dtype,
)

TRAIN_FRACTION = 0.9
_CHUNK = 1 << 22  # bytes read at once, and so characters tokenized, in seconds at most
_SIZES = "sizes.json"


@dataclass(frozen=True)
class Text:
    """A text, and what one pass over it found."""

    name: str  # for messages
    sha256: str  # of the files' bytes
    files: Sequence[tuple[Path, int]]  # those that are not empty, with their lengths
    length: int  # in characters, as the files' lengths
    characters: str  # the distinct ones, sorted
    end_of_texts: int  # occurrences of END_OF_TEXT

    def documents(self, split: str) -> Iterator[tuple[Iterator[str], bool]]:
        """Yields each file's part in a split, in chunks, and whether it ends there.

        The file at the boundary of the splits begins in one and ends in the other.
        """
        cut, end = int(TRAIN_FRACTION * self.length), 0
        start = cut if split == "val" else 0
        stop = cut if split == "train" else self.length
        for path, length in self.files:
            begin, end = end, end + length
            if begin < stop and start < end:
                yield _read_text(path, start - begin, stop - begin), end <= stop


def _read_text(
    path: Path,
    start: int = 0,
    stop: int = sys.maxsize,
    on_bytes: Callable[[bytes], None] = lambda content: None,
) -> Iterator[str]:
    """Yields characters `start` to `stop` of a file in chunks, no byte order mark.

    Calls `on_bytes` with the bytes of each chunk before it is decoded.
    """
    position, decoder = 0, codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        try:
            while position < stop and (content := file.read(_CHUNK)):
                on_bytes(content)
                chunk = decoder.decode(content)
                yield chunk[max(start - position, 0) : max(stop - position, 0)]
                position += len(chunk)
            if position < stop:
                decoder.decode(b"", final=True)  # raises if a character is incomplete
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error


def read_texts(name: str, paths: Sequence[Path]) -> Text:
    """Scans a text once; raises OSError or ValueError if it can't be used.

    Args:
      name: the text's, for messages.
      paths: its files.
    """
    found = scan_once(paths, "text", partial(_scan, paths))
    lengths = zip(paths, found.pop("lengths"), strict=True)
    files = [(path, length) for path, length in lengths if length]
    if not files:
        raise ValueError(f"{name}: the corpus is empty")
    return Text(name, files=files, length=sum(n for _, n in files), **found)


def _scan(paths: Sequence[Path]) -> dict[str, Any]:
    """Reads the files once; returns the fields of `Text`, and the lengths of all."""
    seen = np.zeros(0x110000, bool)  # indexed by code point
    digest, lengths, end_of_texts = hashlib.sha256(), [], 0
    total = sum(path.stat().st_size for path in paths)
    with progress("reading the text", total) as advance:

        def on_bytes(content: bytes) -> None:
            digest.update(content)
            advance(len(content))

        for path in paths:
            length, overlap = 0, ""
            for text in _read_text(path, on_bytes=on_bytes):
                seen[codepoints(text)] = True
                length += len(text)
                text = overlap + text
                end_of_texts += text.count(END_OF_TEXT)
                overlap = text[1 - len(END_OF_TEXT) :]
            lengths.append(length)
    return {
        "sha256": digest.hexdigest(),
        "lengths": lengths,
        "characters": "".join(map(chr, np.flatnonzero(seen))),
        "end_of_texts": end_of_texts,
    }


def make_tokenizer(
    text: Text, name: str, vocab_size: int, log: Callable[[str], None]
) -> Tokenizer:
    """Makes the tokenizer `name`; trains BPE on the train split if it is not cached."""
    if name == "char":
        return CharTokenizer(text.characters)
    if name != "bpe":
        return pretrained.find_tokenizer(name, log)
    path = cache_dir() / "tokenizers" / f"{text.sha256}-bpe-{vocab_size}.json"
    with suppress(OSError, ValueError):  # it is missing or damaged
        return load_tokenizer(path)
    log(f"training a BPE tokenizer of {vocab_size:,} tokens")
    chunks = (chunk for chunks, _ in text.documents("train") for chunk in chunks)
    tokenizer = BPETokenizer.train(chunks, vocab_size)
    replace_file(path, tokenizer.save)
    return tokenizer


def tokenize(
    text: Text,
    tokenizer: Tokenizer,
    splits: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, Tokens]:
    """Returns the tokens by split, memory-mapped; tokenizes unless they are cached.

    Args:
      splits: "train" and "val" or, for the whole, "all".
    """
    boundaries = "".join(f" {length}" for _, length in text.files[1:])
    key = hashlib.sha256((tokenizer.to_json() + boundaries).encode()).hexdigest()
    whole = "" if splits == SPLITS else "-all"
    folder = cache_dir() / "tokens" / f"{text.sha256}-{key[:16]}{whole}"
    if text.end_of_texts and tokenizer.end_of_text is not None:
        log(
            f"{END_OF_TEXT} is text like any other in a corpus (occurrences: "
            f"{text.end_of_texts:,}); to end documents with the token of that name, "
            "give each as a file of its own"
        )
    delete_abandoned(folder.parent)
    if not _is_whole(folder):
        _write_tokens(text, tokenizer, splits, folder, log)
    dtype = token_dtype(tokenizer.vocab_size)
    files = {split: folder / f"{split}.bin" for split in splits}
    return {split: Tokens([map_file(f, dtype)], [f]) for split, f in files.items()}


def _write_tokens(
    text: Text,
    tokenizer: Tokenizer,
    splits: Sequence[str],
    folder: Path,
    log: Callable[[str], None],
) -> None:
    if isinstance(tokenizer, CharTokenizer):
        unknown = "".join(sorted(set(text.characters) - set(tokenizer.characters)))
        if unknown:
            raise ValueError(
                f"{text.name}: characters {unknown!r:.80} are not in the vocabulary "
                f"of {tokenizer.vocab_size} characters"
            )
    shutil.rmtree(folder, ignore_errors=True)  # incomplete or damaged files
    log(f"tokenizing {text.length:,} characters into {folder}")
    dtype = token_dtype(tokenizer.vocab_size)
    with temporary(folder) as tmp_path:
        tmp_path.mkdir()
        with progress("tokenizing", text.length) as advance:
            for split in splits:
                with (tmp_path / f"{split}.bin").open("wb") as file:
                    for ids in _encode(text, split, tokenizer, advance):
                        file.write(ids.astype(dtype).tobytes())
        (tmp_path / _SIZES).write_text(json.dumps(_sizes(tmp_path)))
        try:
            tmp_path.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process wrote it first
                raise


def _encode(
    text: Text, split: str, tokenizer: Tokenizer, advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """Yields the token ids of a split; tells `advance` how many characters are done.

    If there are several files, each is a document: it is tokenized on its own and ends
    with the end-of-text token, if the tokenizer has one.
    """

    def counted(chunks: Iterator[str]) -> Iterator[str]:
        for chunk in chunks:
            yield chunk
            advance(len(chunk))  # once the next chunk is read

    for chunks, ends in text.documents(split):
        yield from tokenizer.encode_chunks(counted(chunks))
        if ends and len(text.files) > 1 and tokenizer.end_of_text is not None:
            yield np.array([tokenizer.end_of_text])


def _is_whole(folder: Path) -> bool:
    """Whether the folder has all of the tokens that were written to it."""
    path = folder / _SIZES
    return path.is_file() and json.loads(path.read_text()) == _sizes(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each existing token file, by split."""
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*.bin"))}
