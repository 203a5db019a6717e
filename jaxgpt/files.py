"""Atomic file writes, and log lines."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

TMP_SUFFIX = ".tmp"  # suffix of files that are being written


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes the file at `path` atomically: to a temporary file that is then renamed.

    Creates the parent folder if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f"{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        write(tmp_path)
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)


def log_line(line: str) -> None:
    """Prints a line to stderr; stdout is for a command's output.

    Only the first process prints. A line that cannot be written, for example to a
    closed terminal, is dropped.
    """
    if is_first_process():
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this is the one process that writes logs, metrics and the config."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
