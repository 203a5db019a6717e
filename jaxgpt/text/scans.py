"""What a scan of files has found, kept in the cache until one of them changes."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.files import replace_file
from jaxgpt.start import cache_dir

_RACY_NS = 2 * 10**9  # no file system has a coarser clock


def scan_once(
    paths: Sequence[Path], name: str, scan: Callable[[], Any], *, is_array: bool = False
) -> Any:
    """Returns `scan()`, or what it found in the same files before.

    Files are the same if their paths, sizes and modification times are. A file that
    changed in the last 2 s could change again at the same time, so nothing is kept.

    Source: git's documentation, technical/racy-git.

    Args:
      name: of the scan.
      scan: returns values for JSON or, if `is_array`, an array without objects.
      is_array: whether to keep a NumPy file, which is memory-mapped.
    """
    now, before = time.time_ns(), file_states(paths)
    key = hashlib.sha256(json.dumps([name, before]).encode()).hexdigest()
    file_name = f"{key}.{'npy' if is_array else 'json'}"
    with suppress(OSError, ValueError, EOFError):  # missing or damaged
        path = cache_dir() / "scans" / file_name
        return np.load(path, "r") if is_array else json.loads(path.read_bytes())
    found = scan()

    def save(tmp_path: Path) -> None:
        with tmp_path.open("wb") as file:
            if is_array:
                np.save(file, found)
            else:
                file.write(json.dumps(found).encode())

    newest = max(changed for _, _, changed in before)
    if newest < now - _RACY_NS and file_states(paths) == before:
        with suppress(OSError):  # no cache is needed
            replace_file(cache_dir() / "scans" / file_name, save)
    return found


def file_states(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Absolute path, size and modification time in ns of each file."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
