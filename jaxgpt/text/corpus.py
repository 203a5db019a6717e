"""Tokenizes text files into train.bin and val.bin, split 90/10 by position.

Each of several files is a document. Token files have nanoGPT's format, raw uint16
(uint32 for more than 65,536 tokens), and are memory-mapped, so neither the text nor its
tokens need to fit in memory.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgpt.config import Config, DataConfig
from jaxgpt.files import delete_abandoned, not_utf8, replace_file, temporary
from jaxgpt.start import cache_dir
from jaxgpt.terminal import progress
from jaxgpt.text import pretrained, tinyshakespeare
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    codepoints,
    fits,
    load_tokenizer,
)

SPLITS = ("train", "val")
TRAIN_FRACTION = 0.9
_CHUNK = 1 << 22  # characters read or tokenized at once, in seconds at most
_SIZES = "sizes.json"
_EXPECTED = (
    "give UTF-8 text files, folders with *.txt files, or a single folder with "
    "train.bin and val.bin"
)


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus: memory-mapped token ids, u16 or u32 [tokens]."""

    train: np.ndarray
    val: np.ndarray
    tokenizer: Tokenizer | None  # None if token files came without a vocabulary


@dataclass(frozen=True)
class _Text:
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


def known_vocab_size(data: DataConfig) -> int | None:
    """Returns the vocabulary size if known without reading the text, else None."""
    if data.tokenizer == "gpt2":
        return pretrained.GPT2_VOCAB_SIZE
    if data.tokenizer == "char" and not data.path:
        return tinyshakespeare.VOCAB_SIZE
    return None


def load_corpus(
    config: Config,
    log: Callable[[str], None] = print,
    tokenizer: Tokenizer | None = None,
) -> tuple[Corpus, Config]:
    """Loads a corpus to train on; fetches and tokenizes text on first use.

    Args:
      config: its `data` section names the text and the tokenizer.
      tokenizer: of an existing run; takes precedence over the config's.

    Returns the corpus, and the config with vocab_size, absolute paths and the sha256 of
    the text (or of the token files) filled in. Raises OSError if a file can't be read
    or fetched, ValueError if its content does not match the config.
    """
    tokens, tokenizer, config = _load(config, log, tokenizer)
    T = config.model.block_size
    for split, ids in tokens.items():
        if len(ids) < T + 1:
            raise ValueError(
                f"the {split} split has {len(ids)} tokens, but a window needs "
                f"block_size + 1 = {T + 1}; use a longer text or a smaller "
                "--model.block-size"
            )
    return Corpus(tokens["train"], tokens["val"], tokenizer), config


def load_split(
    config: Config, split: str, log: Callable[[str], None], tokenizer: Tokenizer | None
) -> np.ndarray:
    """Loads "train", "val", or "all" of a corpus to evaluate on; see `load_corpus`.

    Returns at least two token ids, u16 or u32 [tokens]. "all" of a text is tokenized as
    a whole; "all" of token files is the train split followed by the val split.
    """
    tokens, _, _ = _load(config, log, tokenizer, whole=split == "all")
    ids = tokens[split] if split in tokens else np.concatenate(list(tokens.values()))
    if len(ids) < 2:
        raise ValueError(
            f"a prediction needs 2 tokens, but {split} of the corpus has {len(ids)}; "
            "give a longer text"
        )
    return ids


def _load(
    config: Config,
    log: Callable[[str], None],
    tokenizer: Tokenizer | None,
    whole: bool = False,
) -> tuple[dict[str, np.ndarray], Tokenizer | None, Config]:
    """Returns the tokens by split, the tokenizer if there is one, and the full config.

    The splits are train and val or, of a text that is wanted as a whole, "all".
    """
    name, vocab_size = config.data.tokenizer, config.model.vocab_size
    if name not in ("char", "bpe", "gpt2"):
        name = str(Path(name).resolve())
    paths = tuple(str(Path(path).resolve()) for path in config.data.path)
    data = dataclasses.replace(config.data, path=paths, tokenizer=name)
    splits = ("all",) if whole and not data.has_tokens else SPLITS
    files = _find_files(config.data, log)
    sha256, text_name = _sha256(files), ", ".join(paths) or data.corpus
    if data.sha256 not in ("", sha256):
        raise ValueError(
            f"the corpus has changed: the run was trained on sha256 {data.sha256}, "
            f"but {text_name} now has {sha256}; restore the old text, or train a new "
            "run"
        )
    text = None if data.has_tokens else _scan_text(text_name, sha256, files)
    if text is None:
        folder = Path(paths[0])
        tokenizer = _tokenizer_of_tokens(folder, tokenizer, name, log)
    elif tokenizer is None:
        size = vocab_size or 0  # never 0 for BPE, as `Config` checks
        tokenizer = _make_tokenizer(text, name, size, log)
    if tokenizer and vocab_size and not fits(tokenizer, vocab_size):
        raise ValueError(
            f"vocab_size={vocab_size}, but the tokenizer has {tokenizer.vocab_size} "
            "tokens; omit vocab_size to use the tokenizer's own, or use the tokenizer "
            "that the model was trained with"
        )
    if text and tokenizer:
        folder = _tokenize(text, tokenizer, splits, log)
    known = tokenizer.vocab_size if tokenizer else vocab_size
    if known is None:
        raise ValueError(
            f"the vocabulary of {folder} is unknown (there is no meta.pkl); give its "
            "tokenizer, as in --data.tokenizer gpt2, or its size, as in "
            "--model.vocab-size 50257"
        )
    tokens = {split: _open_tokens(folder / f"{split}.bin", known) for split in splits}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size or known),
        data=dataclasses.replace(data, sha256=sha256),
    )
    return tokens, tokenizer, config


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Dtype of the token files: u16 as in nanoGPT, u32 for larger vocabularies."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _find_files(data: DataConfig, log: Callable[[str], None]) -> list[Path]:
    """Returns the corpus's files in order; raises if one can't be read repeatedly."""
    if data.has_tokens:
        files = [Path(data.path[0], f"{split}.bin") for split in SPLITS]
    elif data.path:
        files = [file for path in data.path for file in _text_files(Path(path))]
    else:
        files = [tinyshakespeare.find_text(log)]
    for path in files:
        pipe = path.exists() and not (path.is_file() or path.is_dir())
        if pipe or str(path) == "-":
            raise ValueError(
                f"{path} is not a regular file, and the text is read more than once; "
                "save it first, as in `zcat text.gz > text.txt`"
            )
        if not path.is_file():
            raise FileNotFoundError(f"{path.absolute()} is not a file; {_EXPECTED}")
    return files


def _text_files(path: Path) -> list[Path]:
    """The path itself, or the text files in the folder at `path` and its subfolders."""
    if not path.is_dir():
        return [path]

    def fail(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for folder, subfolders, names in os.walk(path, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        files += [Path(folder, name) for name in shown if name.lower().endswith(".txt")]
    if not files:
        raise FileNotFoundError(f"{path.absolute()} has no *.txt files; {_EXPECTED}")
    return sorted(files)


def _read_text(path: Path, start: int = 0, stop: int = sys.maxsize) -> Iterator[str]:
    """Yields characters `start` to `stop` of a file in chunks, no byte order mark."""
    position = 0
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        try:
            while position < stop and (chunk := file.read(_CHUNK)):
                yield chunk[max(start - position, 0) : max(stop - position, 0)]
                position += len(chunk)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error) from error


def _scan_text(name: str, sha256: str, paths: Sequence[Path]) -> _Text:
    """Scans the text once; raises OSError or ValueError if it is unusable."""
    seen = np.zeros(0x110000, bool)  # indexed by code point
    files, end_of_texts = [], 0
    total = sum(path.stat().st_size for path in paths)
    with progress("reading the text", total) as advance:
        for path in paths:
            length, overlap = 0, ""
            for text in _read_text(path):
                seen[codepoints(text)] = True
                length += len(text)
                advance(len(text.encode()))
                text = overlap + text
                end_of_texts += text.count(END_OF_TEXT)
                overlap = text[1 - len(END_OF_TEXT) :]
            if length:
                files.append((path, length))
    if not files:
        raise ValueError(f"{name}: the corpus is empty")
    characters = "".join(map(chr, np.flatnonzero(seen)))
    length = sum(length for _, length in files)
    return _Text(name, sha256, files, length, characters, end_of_texts)


def _make_tokenizer(
    text: _Text, name: str, vocab_size: int, log: Callable[[str], None]
) -> Tokenizer:
    """Makes the tokenizer `name`; trains BPE on the train split if it is not cached."""
    if name == "char":
        return CharTokenizer(text.characters)
    if name != "bpe":
        return pretrained.find_tokenizer(name, log)
    path = cache_dir() / "tokenizers" / f"{text.sha256}-bpe-{vocab_size}.json"
    if path.exists():
        return load_tokenizer(path)
    log(f"training a BPE tokenizer of {vocab_size:,} tokens")
    chunks = (chunk for chunks, _ in text.documents("train") for chunk in chunks)
    tokenizer = BPETokenizer.train(chunks, vocab_size)
    replace_file(path, tokenizer.save)
    return tokenizer


def _tokenizer_of_tokens(
    folder: Path, own: Tokenizer | None, name: str, log: Callable[[str], None]
) -> Tokenizer | None:
    """The tokenizer of token files: the run's own, the named one, or the folder's."""
    meta, tokenizer = folder / "meta.pkl", own
    if meta.exists():
        stored: Tokenizer | None = pretrained.load_nanogpt_meta(meta)
    else:
        stored = pretrained.tokenizer_in(folder)
    if not own and name != "char":
        try:
            tokenizer = pretrained.find_tokenizer(name, log)
        except OSError as error:
            if name != "gpt2":
                raise
            log(f"continuing without a tokenizer (only text needs one): {error}")
    if tokenizer and stored and _vocabulary(tokenizer) != _vocabulary(stored):
        raise ValueError(
            f"the tokens in {folder} were made with the tokenizer stored there, not "
            "with this model's; tokenize the text again"
        )
    return tokenizer or stored


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]


def _tokenize(
    text: _Text,
    tokenizer: Tokenizer,
    splits: Sequence[str],
    log: Callable[[str], None],
) -> Path:
    """Returns the folder of token files, which it writes unless they are cached."""
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
    sizes_path = folder / _SIZES
    delete_abandoned(folder.parent)
    if sizes_path.is_file() and json.loads(sizes_path.read_text()) == _sizes(folder):
        return folder
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
    return folder


def _encode(
    text: _Text, split: str, tokenizer: Tokenizer, advance: Callable[[int], None]
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


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of each existing token file, by split."""
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*.bin"))}


def _open_tokens(path: Path, vocab_size: int) -> np.ndarray:
    dtype = np.dtype(token_dtype(vocab_size))
    count, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest:
        raise ValueError(f"{path} is truncated within a {dtype}; restore the file")
    if not count:
        return np.empty(0, dtype)  # which can't be mapped
    tokens = np.memmap(path, dtype, mode="r")
    if (largest := tokens.max()) >= vocab_size:
        raise ValueError(
            f"{path} has token {largest}, outside the vocabulary of {vocab_size}; use "
            f"tokens of the model's tokenizer, or a vocab_size above {largest}"
        )
    return tokens
