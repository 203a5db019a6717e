"""Atomic file writes, paths that any library can use, and text that is not UTF-8."""

import codecs
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    """The error of a text file in another encoding; it says how to convert the file."""
    found = "an unknown encoding, such as LATIN1"
    if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        found = "UTF-16"
    return ValueError(
        f"{path} is not UTF-8 text but in {found} ({error.reason}); convert it first: "
        f"iconv -f {found.split()[-1]} -t UTF-8 {shlex.quote(str(path))} > utf8.txt"
    )


def is_first_process() -> bool:
    """Whether this is the one process that writes logs, metrics and the config."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


@contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """Yields an absolute path to the same folder, of plain ASCII characters.

    Orbax takes a path as a glob pattern, and TensorStore takes only UTF-8. Other paths
    are reached through a symbolic link, which is deleted on exit.
    """
    plain, path = re.compile(r"[\w/.+=@, -]*", re.ASCII), path.absolute()
    if plain.fullmatch(str(path)):
        yield path
        return
    temporary = tempfile.gettempdir()
    parent = temporary if plain.fullmatch(temporary) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="jaxgpt-", dir=parent) as folder:
        link = Path(folder, "link")
        link.symlink_to(path)
        yield link
