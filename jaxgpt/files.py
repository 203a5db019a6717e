"""Atomic file writes, and which process writes."""

import os
from collections.abc import Callable
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


def is_first_process() -> bool:
    """Whether this is the one process that writes logs, metrics and the config."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
