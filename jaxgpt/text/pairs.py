"""Pairs of a source and a target, for an encoder-decoder: files, splits and tokens.

Each source and each target ends with the end-of-text token.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from jaxgpt.config import DataConfig
from jaxgpt.text import reverse, tatoeba
from jaxgpt.text.examples import Sequences
from jaxgpt.text.tables import (
    Log,
    Row,
    Table,
    check_files,
    digest_files,
    encode_known,
    read_jsonl,
    read_text,
    splits_of,
    without_blank,
)
from jaxgpt.text.tokenizer import Tokenizer

_KINDS = (".tsv", ".jsonl")
_FRACTION = 0.05  # of the components, for each of val and test


def open_pairs(data: DataConfig, log: Log) -> Table:
    """Finds a corpus of pairs, without reading it; pairs are split by component.

    Raises OSError or ValueError if its files can't be used or fetched.
    """
    if data.corpus == "reverse" and not data.path:
        return Table(reverse.SHA256, reverse.make_pairs)
    if paths := check_files(data.path, _KINDS):
        sha256 = digest_files(paths)
        read_rows = partial(read_pairs, paths, ", ".join(data.path), log)
    else:
        path, key = tatoeba.find_sentences(log), f"{tatoeba.SHA256} {data.languages}"
        sha256 = hashlib.sha256(key.encode()).hexdigest()
        read_rows = partial(tatoeba.read_pairs, path, data.languages)

    def read() -> tuple[list[Row], np.ndarray]:
        rows = read_rows()
        return rows, splits_of(components(rows), _FRACTION)

    return Table(sha256, read)


def read_pairs(paths: Sequence[Path], name: str, log: Log) -> list[Row]:
    """Reads rows (source, target); equal pairs are read once.

    Args:
      name: the corpus's, for messages.

    Raises ValueError with file and line if a line is no pair.
    """
    rows: list[Row] = []
    for path in paths:
        if path.suffix.lower() == ".jsonl":
            values = read_jsonl(path, ("source", "target"))
            rows += [(each["source"], each["target"]) for _, each in values]
        else:
            rows += _read_tsv(path)
    return list(dict.fromkeys(without_blank(rows, 2, name, log)))


def _read_tsv(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        columns = tuple(line.removesuffix("\r").split("\t"))
        if number == 1 and columns == ("source", "target"):
            raise ValueError(
                f"{path}:1: a TSV has no header; remove this line, as in `tail -n +2`"
            )
        if len(columns) == 2:
            rows.append(columns)
        elif line.strip():
            raise ValueError(
                f"{path}:{number}: a line must be a source, a tab and a target, but "
                f"this one has {len(columns)} columns; keep two, as in `cut -f 1,2`, "
                'or give JSONL of {"source": "...", "target": "..."}'
            )
    return rows


def components(pairs: Sequence[Row]) -> list[str]:
    """For each pair, the smallest text of its component.

    Pairs that share a text, directly or through other pairs, form a component. To keep
    it in one split is to never train on a text that is evaluated.
    """
    parent: dict[str, str] = {}

    def root(text: str) -> str:
        while (above := parent.setdefault(text, text)) != text:
            parent[text] = parent[above]  # halves the path
            text = above
        return text

    for source, target in pairs:
        low, high = sorted((root(source), root(target)))
        parent[high] = low
    return [root(source) for source, _ in pairs]


def encode_sources(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    block_size: int,
    log: Log | None = None,
    name: str = "sources",
) -> Sequences:
    """Tokenizes sources or targets, cut to block_size with the end-of-text token.

    Args:
      log: told how many are cut, and which characters are left out.
      name: "sources" or "targets", for the log.
    """
    encoded = encode_known(texts, tokenizer, log)
    cut = sum(len(ids) >= block_size for ids in encoded)
    if cut and log:
        log(f"{cut:,} of {len(texts):,} {name} are cut to block_size={block_size}")
    end, last = [tokenizer.end_of_text], block_size - 1
    return Sequences.join(np.concatenate([ids[:last], end]) for ids in encoded)
