"""The cache: where it is, how large its parts are, and how to empty it."""

import os
from contextlib import suppress
from pathlib import Path

from tyro.conf import FlagCreatePairsOff

from jaxgpt.files import TMP_SUFFIX, delete, delete_abandoned, is_abandoned
from jaxgpt.start import cache_dir

PARTS = {
    "tokens": "tokenized texts",
    "examples": "tokenized examples",
    "corpora": "prepared documents",
    "scans": "what is known of texts and token files",
    "tokenizers": "tokenizers trained on texts",
    "gpt2": "GPT-2's tokenizer",
    "tinyshakespeare.txt": "Tiny Shakespeare",
    "reviews.jsonl": "movie reviews",
    "tatoeba.tsv": "sentence pairs of Tatoeba",
    "chitchat.jsonl": "everyday conversations",
    "chat_history": "lines typed in chats",
    "xla": "compiled programs",
}


def cache(clear: FlagCreatePairsOff[bool] = False) -> int:
    """Prints where the cache is, and the size of what it holds.

    Args:
        clear: delete all of it; what is needed again is fetched or made again
    """
    folder = cache_dir()
    for part in ("", *PARTS):
        delete_abandoned(folder / part)
    sizes = {name: _size(folder / name) for name in PARTS}
    total = sum(sizes.values())
    print(folder)
    for name, size in [*sizes.items(), ("total", total)]:
        print(f"{size / 2**20:10.1f} MiB  {PARTS.get(name, 'in total')}")
    if elsewhere := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        print(f"compiled programs are in {elsewhere}, which is left as it is")
    if clear:
        kept = [path for name in PARTS for path in _clear(folder / name)]
        left = sum(_size(folder / name) for name in PARTS)
        print(f"deleted {(total - left) / 2**20:.1f} MiB")
        for path in kept:
            print(f"kept {path}: it may not be deleted, or is being written")
        return int(bool(kept))
    return 0


def _clear(part: Path) -> list[Path]:
    """Deletes a file, or what is in a folder; returns what is left.

    What another process may be writing is left.
    """
    entries = list(part.iterdir()) if part.is_dir() else [part]
    for path in entries:
        if not path.name.endswith(TMP_SUFFIX) or is_abandoned(path):
            delete(path)
    return [path for path in entries if path.exists()]


def _size(part: Path) -> int:
    size = 0
    for path in (part, *part.rglob("*")):
        with suppress(FileNotFoundError):  # a program that runs may delete it
            size += path.stat().st_size if path.is_file() else 0
    return size
