"""The Chit Chat Challenge's conversations between two people, from a package.

The one who writes first is the user, the other one the assistant. What one writes
before the other answers is one message. As JSONL of {"messages": [...]}, without
conversations in which nobody answers.
"""

import json
from collections.abc import Callable
from itertools import cycle, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from jaxgpt.start import cache_dir
from jaxgpt.text.fetch import fetch_once, read_wheel

SHA256 = "7d959386b1d8855e6a9f1c175219a4b7446ceda11f188e513aa21ef8b48ced08"
_PACKAGE = "chitchat-dataset==0.9.0"
_PACKAGE_SHA256 = "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
_MEMBER = "chitchat_dataset/dataset.json"


def find_conversations(log: Callable[[str], None]) -> Path:
    """Returns the path of chitchat.jsonl; raises OSError as `fetch_once`."""
    path = cache_dir() / "chitchat.jsonl"
    sources = {"the package index": lambda: [_from_package()]}
    otherwise = "Try again where pip can download packages"
    fetch_once("the chit-chat conversations", {path: SHA256}, sources, log, otherwise)
    return path


def _from_package() -> bytes:
    (content,) = read_wheel(_PACKAGE, _PACKAGE_SHA256, [_MEMBER])
    return to_jsonl(json.loads(content))


def to_jsonl(dataset: dict[str, Any]) -> bytes:
    """Turns the package's conversations into JSONL, equal ones once."""
    lines = []
    for turns in dict.fromkeys(map(_turns, dataset.values())):
        answered = turns[: len(turns) // 2 * 2]  # the last one is an answer
        messages = [
            {"role": role, "content": text}
            for role, text in zip(cycle(["user", "assistant"]), answered, strict=False)
        ]
        if messages:
            lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _turns(conversation: dict[str, Any]) -> tuple[str, ...]:
    """The texts of each turn; the two people take turns."""
    messages = (each for turn in conversation["messages"] for each in turn)
    texts = ((each["sender"], " ".join(each["text"].split())) for each in messages)
    turns = groupby((each for each in texts if each[1]), itemgetter(0))
    return tuple(" ".join(text for _, text in turn) for _, turn in turns)
