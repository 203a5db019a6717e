"""Files that are whole or not there, and lines that a run tells."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

TMP_SUFFIX = ".tmp"  # suffix of what is being written


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes the file at `path` atomically: to a temporary file first, then renamed.

    Makes the folder if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f"{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        write(tmp_path)
        os.replace(tmp_path, path)
    finally:
        tmp_path.unlink(missing_ok=True)


def log_line(line: str) -> None:
    """Prints a line on stderr, where all goes but a command's product.

    Of several processes only the first does. A line that cannot be written, as to a
    terminal that was closed, is no reason to stop.
    """
    if is_first_process():
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process writes what is written once: logs, metrics, the config."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
