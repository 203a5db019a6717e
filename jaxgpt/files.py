"""Atomic file writes, leftovers, and paths and texts that libraries can't read."""

import codecs
import os
import platform
import re
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxgpt.exits import distributed

TMP_SUFFIX = ".tmp"  # suffix of files and folders that are being written


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes the file at `path` atomically: to a temporary file that is then renamed.

    Creates the parent folder if needed.
    """
    with temporary(path) as tmp_path:
        write(tmp_path)
        os.replace(tmp_path, path)


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file or folder at, which is then renamed.

    Creates the parent folder if needed, and deletes what processes that were killed
    have left in it. What is not renamed is deleted at the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    delete_abandoned(path.parent)
    tmp_path = path.with_name(f"{path.name}.{_machine()}-{os.getpid()}{TMP_SUFFIX}")
    delete(tmp_path)  # an earlier process may have had this PID
    try:
        yield tmp_path
    finally:
        delete(tmp_path)


def delete_abandoned(folder: Path) -> None:
    """Deletes what processes that were killed have left in a folder."""
    for path in folder.glob(f"*{TMP_SUFFIX}"):
        if is_abandoned(path):
            delete(path)


def is_abandoned(tmp_path: Path) -> bool:
    """Whether the process that made the temporary file or folder has certainly ended.

    Its name has the machine and the PID. Nothing is known of other machines' processes.
    """
    made = re.search(rf"\.{_machine()}-(\d+){re.escape(TMP_SUFFIX)}$", tmp_path.name)
    if not made or os.name != "posix":  # elsewhere signal 0 would interrupt
        return False
    try:
        os.kill(int(made[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False


def _machine() -> str:
    """Names the machine and, on Linux, the container, within which PIDs are unique."""
    namespace = Path("/proc/self/ns/pid")
    number = namespace.stat().st_ino if namespace.exists() else 0
    return f"{zlib.crc32(f'{platform.node()} {number}'.encode()):08x}"


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it exists and may be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    """The error of a text file in another encoding; it says how to convert the file."""
    quoted, start = shlex.quote(str(path)), error.object[:2]
    if start == b"\x1f\x8b":
        advice = f"it is compressed; decompress it: zcat {quoted} > text.txt"
    else:
        utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "UTF-16" if utf16 else "LATIN1"
        advice = (
            f"if it is {encoding}, convert it: iconv -f {encoding} -t UTF-8 {quoted}"
        )
        advice += " > utf8.txt"
    return ValueError(f"{path} is not UTF-8 text ({error.reason}); {advice}")


def is_first_process() -> bool:
    """Whether this is the one process that writes logs, metrics and the config."""
    jax = distributed()
    return not jax or jax.process_index() == 0


@contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """Yields an absolute path to the same file or folder, of plain ASCII characters.

    Orbax takes a path as a glob pattern, and many libraries take only UTF-8. Other
    paths are reached by a file descriptor or, where there is no /proc, through a
    symbolic link, which is deleted on exit.
    """
    plain, path = re.compile(r"[\w/.+=@, -]*", re.ASCII), path.absolute()
    if os.name != "posix" or plain.fullmatch(str(path)):
        yield path
    elif Path("/proc/self/fd").exists():
        opened = os.open(path, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{opened}")
        finally:
            os.close(opened)
    else:
        with tempfile.TemporaryDirectory(prefix="jaxgpt-") as link_folder:
            link = Path(link_folder, "link")
            link.symlink_to(path)
            yield link
