"""Turns documents into token shards, which `train.py --data.path DIR` reads."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from jaxgpt.terminal import log_line
from jaxgpt.text import prepare as preparing


def prepare(
    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="INPUT ...")],
    out_dir: Path,
    tokenizer: str,
    vocab_size: int | None = None,
    text_field: str = "text",
    val_fraction: float = 0.01,
    dedup: FlagCreatePairsOff[bool] = False,
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
) -> int:
    """Turns documents into token shards, which `train.py --data.path DIR` reads.

    A text file is a document, and so is each line of JSONL (*.jsonl, *.ndjson, *.json)
    and each row of parquet; text and JSONL may end in .gz or .zst. In a folder, *.json
    is left out. A file is read once, even if several inputs name it. A hash of its text
    decides whether a document is for training or for validation. An interrupted run
    goes on when the same command is given again, but begins to learn the vocabulary of
    char or bpe again.

    Args:
        inputs: files, folders, or patterns in quotes, as in 'data/*.parquet'
        out_dir: directory to write, which must be new or empty
        tokenizer: char, gpt2, a tokenizer.json or a folder with one, or bpe: learnt
        vocab_size: number of tokens that bpe learns
        text_field: field of JSONL, or column of parquet, that has the text
        val_fraction: share of the documents that is for validation
        dedup: drop documents whose text is exactly that of an earlier one
        on_error: stop at a document that can't be read, or skip and count them
        workers: processes that tokenize; as many as there are cores by default
        shard_tokens: tokens after which a new shard begins, at the end of a document
    """
    try:
        preparing.prepare(
            inputs,
            out_dir,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            text_field=text_field,
            val_fraction=val_fraction,
            dedup=dedup,
            on_error=on_error,
            workers=workers,
            shard_tokens=shard_tokens,
            log=log_line,
        )
    except KeyboardInterrupt:
        log_line("the same command goes on where this one has stopped")
        raise
    log_line(f"train on it: python train.py --data.path {shlex.quote(str(out_dir))}")
    return 0
