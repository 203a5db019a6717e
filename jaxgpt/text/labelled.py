"""Texts with labels, for an encoder: CSV and JSONL files, and their tokens.

Each text begins with the end-of-text token, as BERT's begin with [CLS].
"""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxgpt.config import DataConfig
from jaxgpt.text import reviews
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

_KINDS = (".csv", ".jsonl")
_LONGEST_NAME = 100  # characters of a label or a source
_FRACTION = 0.1  # of the texts, for each of val and test
_REVIEW_LABELS = {"0": "negative", "1": "positive"}


def open_labelled(data: DataConfig, needs_label: bool, log: Log) -> Table:
    """Finds a corpus of labelled texts, without reading it; texts are split by hash.

    Args:
      needs_label: False for rows of only the text.

    Raises OSError or ValueError if its files can't be used or fetched.
    """
    paths, name = check_files(data.path, _KINDS), ", ".join(data.path) or data.corpus
    files = paths or [reviews.find_reviews(log)]

    def read() -> tuple[list[Row], np.ndarray]:
        rows = read_labelled(files, needs_label, name, log)
        if needs_label and not paths:
            rows = [(text, _REVIEW_LABELS[n], source) for text, n, source in rows]
        return rows, splits_of([row[0] for row in rows], _FRACTION)

    return Table(digest_files(paths) if paths else reviews.SHA256, read)


def known_labels(data: DataConfig) -> tuple[str, ...]:
    """The labels, if they are known without reading the corpus; else none."""
    return () if data.path else tuple(sorted(_REVIEW_LABELS.values()))


def read_labelled(
    paths: Sequence[Path], needs_label: bool, name: str, log: Log
) -> list[Row]:
    """Reads rows (text, label, source), with source "" if there is none.

    Whitespace around a label is no part of it.

    Args:
      needs_label: False returns rows (text,).
      name: the corpus's, for messages.

    Raises ValueError with file and line if a row lacks a text or a label.
    """
    required = ("text", "label") if needs_label else ("text",)
    rows: list[Row] = []
    for path in paths:
        read = _read_csv if path.suffix.lower() == ".csv" else read_jsonl
        for place, values in read(path, required):
            others: Row = ()
            if needs_label:
                label, source = values["label"].strip(), values.get("source") or ""
                if not (label.isprintable() and 0 < len(label) <= _LONGEST_NAME):
                    raise ValueError(
                        f"{place}: the label {label!r:.40} must have 1 to "
                        f"{_LONGEST_NAME} printable characters; correct it"
                    )
                others = label, source[:_LONGEST_NAME]
            rows.append((values["text"], *others))
    return without_blank(rows, 1, name, log)


def _read_csv(
    path: Path, required: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    start = 1  # line on which the row begins
    try:
        header = list(reader.fieldnames or ())
        if any(header.count(name) != 1 for name in required):
            raise ValueError(
                f"{path}: the first line must name the columns {' and '.join(required)}"
                f" once, separated by commas, but it is {', '.join(header)!r:.80}"
            )
        start = reader.line_num + 1
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{start}: the row does not have the header's "
                    f"{len(header)} columns; quote texts that contain "
                    'commas, as in "well, good"'
                )
            yield f"{path}:{start}", row
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{start}: {error}; fix the quotes") from error


def encode_texts(
    texts: Sequence[str], tokenizer: Tokenizer, block_size: int, log: Log | None = None
) -> Sequences:
    """Tokenizes texts; of longer ones keeps the first and the last half of the tokens.

    Source: Sun et al. 2019, "How to Fine-Tune BERT for Text Classification?",
    section 5.3.1.

    Args:
      block_size: most tokens of a text, with the end-of-text token at its start.
      log: told how many are cut, and which characters are left out.
    """
    room = block_size - 1
    tail = room // 2
    encoded = encode_known(texts, tokenizer, log)
    cut = sum(len(ids) > room for ids in encoded)
    if cut and log:
        log(
            f"{cut:,} of {len(texts):,} texts are longer than block_size={block_size}: "
            "their first and last tokens are kept"
        )
    end, parts = [tokenizer.end_of_text], []
    for ids in encoded:
        kept = (
            (ids,) if len(ids) <= room else (ids[: room - tail], ids[len(ids) - tail :])
        )
        parts.append(np.concatenate([end, *kept]))
    return Sequences.join(parts)


def encode_pieces(
    texts: Sequence[str], tokenizer: Tokenizer, block_size: int, log: Log | None = None
) -> tuple[Sequences, np.ndarray]:
    """Tokenizes texts, longer ones as several pieces of about equal length.

    Returns the pieces, of at most block_size tokens with the end-of-text token at their
    start, and the index of each one's text [pieces]. Logs how many texts are longer,
    and which characters are left out.
    """
    pieces, of_text, longer = [], [], 0
    for n, ids in enumerate(encode_known(texts, tokenizer, log)):
        count = max(1, -(-len(ids) // (block_size - 1)))
        pieces += np.array_split(ids, count)
        of_text += [n] * count
        longer += count > 1
    if longer and log:
        log(
            f"{longer:,} of {len(texts):,} texts are longer than block_size="
            f"{block_size}: they become several pieces"
        )
    end = [tokenizer.end_of_text]
    sequences = Sequences.join(np.concatenate([end, ids]) for ids in pieces)
    return sequences, np.array(of_text)
