"""The corpus of a config: its tokens and its tokenizer, from whatever `data` names.

Folders of tokens are memory-mapped as they are. Text files are tokenized into the
cache, split by position; JSONL and parquet files are prepared into the cache, split by
document.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.config import ClassifierConfig, Config, DataConfig, is_token_folder
from jaxgpt.files import replace_file
from jaxgpt.start import cache_dir
from jaxgpt.text import (
    assistant,
    preferences,
    pretrained,
    reverse,
    reviews,
    tasks,
    tinyshakespeare,
)
from jaxgpt.text.conversations import CHAT_TOKENS, make_rows
from jaxgpt.text.documents import find_files, is_records
from jaxgpt.text.prepare import UNFINISHED, prepare
from jaxgpt.text.scans import file_states
from jaxgpt.text.shards import MANIFEST, SPLITS, Tokens, open_folder
from jaxgpt.text.tables import join_digests
from jaxgpt.text.textfiles import make_tokenizer, read_texts, tokenize
from jaxgpt.text.tokenizer import END_OF_TEXT, Tokenizer, fits


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus.

    Attributes:
      train, val: the splits, as `Tokens`; those of several folders follow each other.
        `PackedDocuments` of conversations; `Examples` for tasks other than next-token
        prediction.
      tokenizer: None if token files came without a vocabulary.
      parts: the train split of each path, if `data.weights` are given.
    """

    train: Any
    val: Any
    tokenizer: Tokenizer | None
    parts: Sequence[Any] = ()


# Of characters, by kind and name of a corpus.
_VOCAB_SIZES = {
    ("next-token", "tinyshakespeare"): tinyshakespeare.VOCAB_SIZE,
    ("translation", "reverse"): reverse.VOCAB_SIZE,
    ("conversations", "assistant"): assistant.VOCAB_SIZE,
}


def known_vocab_size(config: Config) -> int | None:
    """Returns the vocabulary size if known without reading the text, else None."""
    data, kind = config.data, tasks.kind_of(config)
    if (data.tokenizer, data.path) == ("char", ()):
        return _VOCAB_SIZES.get((kind, data.corpus))
    if data.tokenizer == "gpt2" and kind in ("next-token", "conversations"):
        new = CHAT_TOKENS[1:] if kind == "conversations" else ()  # after the first
        return pretrained.GPT2_VOCAB_SIZE + len(new)
    return None


def load_corpus(
    config: Config,
    log: Callable[[str], None] = print,
    tokenizer: Tokenizer | None = None,
) -> tuple[Corpus, Config]:
    """Loads a corpus to train on; fetches and tokenizes text on first use.

    Args:
      config: its `data` section names the text and the tokenizer, its model the task.
      tokenizer: of an existing run; takes precedence over the config's.

    Returns the corpus, and the config with vocab_size, labels, absolute paths and the
    sha256 of the text (or of the token files or manifests) filled in. Raises OSError if
    a file can't be read or fetched, ValueError if its content does not match the
    config.
    """
    tasks.check_corpus(config)
    if tasks.kind_of(config) != "next-token":
        of_split, tokenizer, config = _load_examples(config, log, tokenizer)
        parts = [of_split("train", path=n) for n in range(len(config.data.weights))]
        return Corpus(of_split("train"), of_split("val"), tokenizer, parts), config
    folders, tokenizer, config = _load(config, SPLITS, log, tokenizer)
    train, val = (Tokens.join([each[split] for each in folders]) for split in SPLITS)
    parts = [each["train"] for each in folders] if config.data.weights else []
    least, needs = 1, "packing needs"
    if config.data.packing == "windows":
        least, needs = config.model.block_size + 1, "a window needs block_size + 1 ="
    names = ["train", "val", *config.data.path]
    for name, tokens in zip(names, [train, val, *parts], strict=False):
        if len(tokens) < least:
            raise ValueError(
                f"the {name} split has {len(tokens)} tokens, but {needs} {least}; use "
                "a longer text, a smaller --model.block-size or, for documents, "
                "`python -m jaxgpt prepare` with another --val-fraction"
            )
    return Corpus(train, val, tokenizer, parts), config


def load_split(
    config: Config, split: str, log: Callable[[str], None], tokenizer: Tokenizer | None
) -> Any:
    """Loads "train", "val", or "all" of a corpus to evaluate on; see `load_corpus`.

    Returns `Tokens`, at least two; "all" of a text is tokenized as a whole; "all" of
    token files and documents is the train split followed by the val split. For other
    tasks than next-token prediction returns `Examples`, and for conversations packed
    rows, which also have a "test" split.
    """
    if tasks.kind_of(config) != "next-token":
        of_split, _, _ = _load_examples(config, log, tokenizer)
        return of_split(split)
    wanted = ("all",) if split == "all" else SPLITS
    folders, _, _ = _load(config, wanted, log, tokenizer)
    names = [split] if split in folders[0] else SPLITS
    tokens = Tokens.join([each[name] for name in names for each in folders])
    if len(tokens) < 2:
        raise ValueError(
            f"a prediction needs 2 tokens, but {split} of the corpus has {len(tokens)};"
            " give a longer text"
        )
    return tokens


def _load(
    config: Config,
    splits: Sequence[str],
    log: Callable[[str], None],
    tokenizer: Tokenizer | None,
) -> tuple[list[dict[str, Tokens]], Tokenizer | None, Config]:
    """Returns each folder's tokens by split, the tokenizer, and the full config.

    A text counts as one folder, with the splits that are wanted; the others have train
    and val.
    """
    data, vocab_size = _with_absolute_paths(config.data), config.model.vocab_size
    files = [] if data.has_tokens else _find_files(config.data, log)
    if data.has_tokens or any(map(is_records, files)):
        folders, name = [Path(path) for path in data.path], data.tokenizer
        if not data.has_tokens:
            folder, data = _prepare(files, data, vocab_size, log, tokenizer)
            folders, name = [folder], "char"
        tokenizer = _tokenizer_of_tokens(folders, tokenizer, name, log)
        known = tokenizer.vocab_size if tokenizer else vocab_size
        if known is None:
            raise ValueError(
                f"the vocabulary of {folders[0]} is unknown (there is no meta.pkl or "
                "tokenizer.json); give its tokenizer, as in --data.tokenizer gpt2, or "
                "its size, as in --model.vocab-size 50257"
            )
        _check_fits(tokenizer, vocab_size)
        opened = [open_folder(folder, known) for folder in folders]
        tokens, digests = [each for each, _ in opened], [sha256 for _, sha256 in opened]
        sha256 = join_digests(digests)
        _check_unchanged(data, sha256)
    else:
        text = read_texts(_name(data), files)
        _check_unchanged(data, sha256 := text.sha256)
        size = vocab_size or 0  # never 0 for BPE, as `Config` checks
        tokenizer = tokenizer or make_tokenizer(text, data.tokenizer, size, log)
        _check_fits(tokenizer, vocab_size)
        known = tokenizer.vocab_size
        tokens = [tokenize(text, tokenizer, splits, log)]
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=vocab_size or known),
        data=dataclasses.replace(data, sha256=sha256),
    )
    return tokens, tokenizer, config


def _load_examples(
    config: Config, log: Callable[[str], None], tokenizer: Tokenizer | None
) -> tuple[Callable[..., Any], Tokenizer, Config]:
    """Returns a function from a split to its examples, the tokenizer, the full config.

    Examples of conversations are packed rows, and a model for them that starts from
    another run gets rows for the new tokens.
    """
    model, data, kind = config.model, config.data, tasks.kind_of(config)
    data = _with_absolute_paths(data)
    table = tasks.open_table(kind, data, log)
    _check_unchanged(data, table.sha256)
    size = model.vocab_size
    if kind == "conversations" and config.train.init_from and not tokenizer:
        size = None  # the tokenizer's, which may have more tokens
    tokenizer = tokenizer or tasks.make_tokenizer(table, config, log)
    _check_fits(tokenizer, size)
    arrays = tasks.tokenize(table, config, tokenizer, log)
    size = max(model.vocab_size or 0, tokenizer.vocab_size)
    model = dataclasses.replace(model, vocab_size=size)
    match model:
        case ClassifierConfig(labels=()):
            model = dataclasses.replace(model, labels=tasks.labels_of(arrays))
    data = dataclasses.replace(data, sha256=table.sha256)
    config = dataclasses.replace(config, model=model, data=data)
    if kind in ("preferences", "prompts"):
        of_split = partial(preferences.make_examples, arrays, config, log)
        return of_split, tokenizer, config
    if kind == "conversations":
        return partial(make_rows, arrays, config, tokenizer, log), tokenizer, config
    return partial(tasks.make_examples, arrays, model, tokenizer), tokenizer, config


def _with_absolute_paths(data: DataConfig) -> DataConfig:
    name = data.tokenizer
    if name not in pretrained.NAMES:
        name = str(Path(name).resolve())
    # A link keeps its name, whose suffix says what the file holds.
    paths = tuple(os.path.abspath(path) for path in data.path)
    return dataclasses.replace(data, path=paths, tokenizer=name)


def _find_files(data: DataConfig, log: Callable[[str], None]) -> list[Path]:
    """Returns the files of text or of documents.

    Raises OSError or ValueError if they can't be used, or a path is of another kind.
    """
    for path in data.path:
        if is_token_folder(path):
            raise ValueError(
                f"{path} is a folder of tokens, but not every path of --data.path is; "
                "give only such folders, or only text, JSONL and parquet"
            )
        if Path(path, UNFINISHED).is_dir():
            raise ValueError(
                f"{path} is a corpus that is not prepared to the end; run the same "
                "`python -m jaxgpt prepare` again"
            )
    if data.weights:
        raise ValueError(
            "--data.weights are for folders of tokens, which `python -m jaxgpt prepare`"
            f" writes, and {_name(data)} is not one"
        )
    if data.path:
        try:
            return find_files(data.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}, or folders of tokens, with a {MANIFEST} or with train.bin "
                "and val.bin"
            ) from error
    if data.corpus == "reviews":
        return [reviews.find_reviews(log)]
    return [tinyshakespeare.find_text(log)]


def _name(data: DataConfig) -> str:
    return ", ".join(data.path) or data.corpus


def _check_unchanged(data: DataConfig, sha256: str) -> None:
    if data.sha256 not in ("", sha256):
        raise ValueError(
            f"the corpus has changed: the run was trained on sha256 {data.sha256}, "
            f"but {_name(data)} now has {sha256}; restore the old text, or train a "
            "new run"
        )


def _check_fits(tokenizer: Tokenizer | None, vocab_size: int | None) -> None:
    if tokenizer and vocab_size and not fits(tokenizer, vocab_size):
        raise ValueError(
            f"vocab_size={vocab_size}, but the tokenizer has {tokenizer.vocab_size} "
            "tokens; omit vocab_size to use the tokenizer's own, or use the tokenizer "
            "that the model was trained with"
        )


def _tokenizer_of_tokens(
    folders: Sequence[Path],
    own: Tokenizer | None,
    name: str,
    log: Callable[[str], None],
) -> Tokenizer | None:
    """The tokenizer of token files: the run's own, the named one, or the folders'."""
    stored = {folder: found for folder in folders if (found := _stored(folder))}
    tokenizer = own
    if not own and not (name == "char" or (name == "bpe" and stored)):
        try:
            tokenizer = pretrained.find_tokenizer(name, log)
        except OSError as error:
            if name != "gpt2":
                raise
            log(f"continuing without a tokenizer (only text needs one): {error}")
    for folder, found in stored.items():
        tokenizer = tokenizer or found
        if found is not tokenizer and _vocabulary(found) != _vocabulary(tokenizer):
            raise ValueError(
                f"the tokens in {folder} were made with the tokenizer stored there, "
                "not with the model's or that of the other folders; tokenize the text "
                "again"
            )
    return tokenizer


def _stored(folder: Path) -> Tokenizer | None:
    """The tokenizer beside token files, if there is one."""
    if (meta := folder / "meta.pkl").exists():
        return pretrained.load_nanogpt_meta(meta)
    return pretrained.tokenizer_in(folder)


def _vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]


def _prepare(
    files: Sequence[Path],
    data: DataConfig,
    vocab_size: int | None,
    log: Callable[[str], None],
    own: Tokenizer | None,
) -> tuple[Path, DataConfig]:
    """Prepares documents into the cache, unless they are there; returns the folder.

    Also returns the config, which names a run's own tokenizer if that is used. It is
    not if the run was trained on the documents: the manifest depends on the name.
    """
    name, tokenizer = data.tokenizer, own
    if own and own.end_of_text is None:
        raise ValueError(
            f"{_name(data)}: documents end with {END_OF_TEXT}, which the model's "
            "tokenizer does not have; give the text as text files"
        )
    if name not in pretrained.NAMES or (own and not data.sha256):
        tokenizer = own or pretrained.find_tokenizer(name, log)
        digest = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        path = cache_dir() / "tokenizers" / f"{digest}.json"
        replace_file(path, tokenizer.save)
        name = str(path)
        if own:
            data = dataclasses.replace(data, tokenizer=name)
    elif name == "gpt2":
        tokenizer = pretrained.gpt2_tokenizer(log)
    _check_fits(tokenizer, vocab_size)  # before all that work
    inputs = data.path or [str(file) for file in files]
    options: dict[str, Any] = {"tokenizer": name}
    if name == "bpe":
        options["vocab_size"] = vocab_size
    if not data.path:
        options["val_fraction"] = reviews.VAL_FRACTION
    key = json.dumps([inputs, file_states(files), options])
    folder = cache_dir() / "corpora" / hashlib.sha256(key.encode()).hexdigest()
    if not (folder / MANIFEST).exists():
        log(
            f"preparing {_name(data)} into {folder}; `python -m jaxgpt prepare` has "
            "more options"
        )
        prepare(inputs, folder, log=log, **options)
    return folder, data
