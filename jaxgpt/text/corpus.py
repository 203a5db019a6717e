"""Text files become token files: train.bin and val.bin, split 90/10 by position.

The token files are nanoGPT's: raw uint16 (uint32 above 65,536 tokens), read by memory
map, so neither the text nor its tokens need fit in memory.
"""

import codecs
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgpt import runtime
from jaxgpt.config import Config, DataConfig
from jaxgpt.text import tinyshakespeare
from jaxgpt.text.tokenizer import CharTokenizer, codepoints, load_nanogpt_meta

SPLITS = ("train", "val")
TRAIN_FRACTION = 0.9
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
      train, val: token ids, memory-mapped, u16 or u32 [tokens].
      tokenizer: None if the corpus came as token files without a vocabulary.
    """

    train: np.ndarray
    val: np.ndarray
    tokenizer: CharTokenizer | None


def named_vocab_size(data: DataConfig) -> int | None:
    """Vocabulary of a corpus known by name, which needs no look at its text."""
    return None if data.path else tinyshakespeare.VOCAB_SIZE


def load_corpus(
    config: Config, log: Callable[[str], None] = print
) -> tuple[Corpus, Config]:
    """Finds the text (fetches Tiny Shakespeare if need be) and tokenizes it once.

    Args:
      config: its data section says where the text comes from.
      log: called with a line on each thing that takes a while.

    Returns the corpus, and the config with what it settles filled in: vocab_size, the
    sha256 (of the text, or of the token files where they are all there is) and absolute
    paths. Raises OSError if a file cannot be had, ValueError if its content does not
    fit the config.
    """
    data, vocab_size = config.data, config.model.vocab_size
    paths = [Path(path).resolve() for path in data.path]
    data = dataclasses.replace(data, path=tuple(map(str, paths)))
    paths = paths or [{"tinyshakespeare": _tinyshakespeare_path}[data.corpus](log)]
    folder, sha256 = _token_folder(paths, log)
    if data.sha256 not in ("", sha256):
        raise ValueError(
            f"the corpus has changed: the run was trained on sha256 {data.sha256}, "
            f"{', '.join(data.path) or data.corpus} now has {sha256}; "
            "bring the old text back, or train a new run"
        )
    tokenizer = _find_tokenizer(folder)
    found_size = tokenizer.vocab_size if tokenizer else vocab_size
    if found_size is None:
        raise ValueError(
            f"{folder} says nothing of its vocabulary (there is no meta.pkl); "
            "give its size, as in --model.vocab-size 50257"
        )
    if vocab_size not in (None, found_size):
        raise ValueError(
            f"vocab_size={vocab_size}, but the corpus has {found_size} distinct "
            "tokens; leave --model.vocab-size out to take the corpus's own"
        )
    train, val = (
        _open_tokens(folder / f"{split}.bin", found_size, config.model.block_size)
        for split in SPLITS
    )
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=found_size),
        data=dataclasses.replace(data, sha256=sha256),
    )
    return Corpus(train, val, tokenizer), config


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Type of the token files: u16 as nanoGPT's, u32 where ids need more."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


def _tinyshakespeare_path(log: Callable[[str], None]) -> Path:
    path = runtime.cache_dir() / "tinyshakespeare.txt"
    if path.exists():
        if _sha256([path]) != tinyshakespeare.SHA256:
            raise ValueError(
                f"{path} is not Tiny Shakespeare (its sha256 is wrong); delete it and "
                "it will be fetched again"
            )
        return path
    text = tinyshakespeare.fetch(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_bytes(text)
    os.replace(aside, path)
    return path


def _token_folder(paths: list[Path], log: Callable[[str], None]) -> tuple[Path, str]:
    """The folder of token files that nanoGPT or we have made, and the sha256."""
    if len(paths) == 1 and paths[0].is_dir():
        files = [paths[0] / f"{split}.bin" for split in SPLITS]
        _check_files(files)
        return paths[0], _sha256(files)
    _check_files(paths)
    return _tokenize(paths, log)


def _check_files(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not a file; --data.path takes UTF-8 text files, or one "
                "directory with train.bin and val.bin"
            )


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _read_text(paths: Sequence[Path]) -> Iterator[str]:
    """Yields the files' text, one after the other, a chunk at a time."""
    for path in paths:
        decoder = codecs.getincrementaldecoder("utf-8")()
        with path.open("rb") as file:
            while True:
                chunk = file.read(_CHUNK_BYTES)
                pending = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(chunk, final=not chunk)
                except UnicodeDecodeError as error:
                    offset = file.tell() - len(chunk) - pending + error.start
                    raise ValueError(
                        f"{path} is not UTF-8 text: byte {offset} is "
                        f"0x{error.object[error.start]:02x}; convert the file first"
                    ) from error
                if text:
                    yield text
                if not chunk:
                    break


def _tokenize(paths: list[Path], log: Callable[[str], None]) -> tuple[Path, str]:
    """Makes the folder of token files, or finds it made; returns it and the sha256."""
    seen = np.zeros(0x110000, bool)  # indexed by code point
    digest, length = hashlib.sha256(), 0
    for text in _read_text(paths):
        seen[codepoints(text)] = True
        digest.update(text.encode())
        length += len(text)
    if not length:
        raise ValueError(f"{', '.join(map(str, paths))}: no text, the corpus is empty")
    sha256 = digest.hexdigest()
    folder = runtime.cache_dir() / "tokens" / sha256
    tokenizer = CharTokenizer("".join(map(chr, np.flatnonzero(seen))))
    itemsize = np.dtype(token_dtype(tokenizer.vocab_size)).itemsize
    if _holds(folder, length * itemsize):
        return folder, sha256
    shutil.rmtree(folder, ignore_errors=True)  # of files that were cut or lost since
    log(f"tokenizing {length:,} characters into {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_suffix(f".{os.getpid()}")
    aside.mkdir(exist_ok=True)
    try:
        _write_tokens(paths, tokenizer, int(TRAIN_FRACTION * length), aside)
        tokenizer.save(aside / "tokenizer.json")
        aside.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first: its files are these
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder, sha256


def _holds(folder: Path, size: int) -> bool:
    """Whether the folder has a vocabulary, and token files of `size` bytes together."""
    if not (folder / "tokenizer.json").is_file():
        return False
    files = [folder / f"{split}.bin" for split in SPLITS]
    return size == sum(path.stat().st_size for path in files if path.exists())


def _write_tokens(
    paths: list[Path], tokenizer: CharTokenizer, train_length: int, folder: Path
) -> None:
    """Writes `train_length` characters to train.bin and the others to val.bin."""
    dtype, position = token_dtype(tokenizer.vocab_size), 0
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "val.bin").open("wb") as val,
    ):
        for text in _read_text(paths):
            ids = tokenizer.encode(text).astype(dtype)
            cut = min(max(train_length - position, 0), len(ids))
            train.write(ids[:cut].tobytes())
            val.write(ids[cut:].tobytes())
            position += len(ids)


def _find_tokenizer(folder: Path) -> CharTokenizer | None:
    if (folder / "tokenizer.json").exists():
        return CharTokenizer.load(folder / "tokenizer.json")
    if (folder / "meta.pkl").exists():
        return load_nanogpt_meta(folder / "meta.pkl")
    return None


def _open_tokens(path: Path, vocab_size: int, block_size: int) -> np.ndarray:
    dtype = np.dtype(token_dtype(vocab_size))
    count, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise ValueError(f"{path} is cut short: its size is no multiple of {dtype}")
    if count < block_size + 1:
        raise ValueError(
            f"the {path.stem} split has {count} tokens, a window needs block_size + 1 "
            f"= {block_size + 1}; use a longer text or a smaller --model.block-size"
        )
    tokens = np.memmap(path, dtype, mode="r")
    largest = max(
        tokens[start : start + _CHUNK_BYTES].max()
        for start in range(0, count, _CHUNK_BYTES)
    )
    if largest >= vocab_size:
        raise ValueError(
            f"{path} has token {largest}, outside the vocabulary of {vocab_size}; "
            "give the right --model.vocab-size"
        )
    return tokens
