"""Characters to token ids and back."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np


def codepoints(text: str) -> np.ndarray:
    """Unicode code points of `text`, u32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer:
    """One token per character; a token's id is the character's place in `characters`.

    Source: the lecture's `stoi` and `itos`.
    """

    def __init__(self, characters: str):
        """Takes the vocabulary in id order; raises ValueError if one occurs twice."""
        distinct = isinstance(characters, str) and len(set(characters))
        if not characters or distinct != len(characters):
            raise ValueError(
                f"a vocabulary needs distinct characters, not {characters!r:.80}"
            )
        self.characters = characters
        self._codepoints = codepoints(characters)
        self._ids = np.full(0x110000, -1, np.int32)  # indexed by code point
        self._ids[self._codepoints] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """The tokenizer of `text`'s sorted distinct characters."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, i32 [len(text)].

        Raises ValueError that names the first character outside the vocabulary.
        """
        ids = self._ids[codepoints(text)]
        if len(ids) and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            raise ValueError(
                f"character {text[position]!r} at position {position} is not in the "
                f"vocabulary of {self.vocab_size} characters: {self.characters!r}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; raises ValueError on an id outside the vocabulary."""
        array = np.asarray(list(ids), np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(
                f"token ids run from {array.min()} to {array.max()}, the vocabulary "
                f"from 0 to {self.vocab_size - 1}"
            )
        return self._codepoints[array].tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: Path) -> None:
        """Writes the tokenizer as JSON."""
        content = {"type": "char", "characters": self.characters}
        path.write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote; raises ValueError that names a file of another form.

        The same characters in the same order give the same ids.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["type"] != "char":
                raise ValueError(f"type {content['type']!r} is not known")
            return cls(content["characters"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a tokenizer of jaxgpt: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers and strings; refuses a pickle that names code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_nanogpt_meta(path: Path) -> CharTokenizer:
    """The tokenizer in the meta.pkl of a prepared nanoGPT data directory.

    Raises ValueError if the file is not one, or would run code.
    Source: nanoGPT data/shakespeare_char/prepare.py.
    """
    try:
        with path.open("rb") as file:
            itos = _PlainUnpickler(file).load()["itos"]
        characters = [itos[i] for i in range(len(itos))]
        if any(len(character) != 1 for character in characters):
            raise ValueError("a token of other than one character")
        return CharTokenizer("".join(characters))
    except OSError:
        raise
    except Exception as error:  # unpickling a damaged file may raise anything
        raise ValueError(f"{path} holds no character vocabulary: {error}") from error
