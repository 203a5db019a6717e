"""Text to token ids and back: a character a token, or byte-level BPE."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Where no token crosses, whatever stands before and after.
_BOUNDARY = re.compile(r"(?<=\S)(?=[ \t\r\n])")
_SEGMENT = 1 << 16  # characters; the segments of a text are encoded in parallel


def codepoints(text: str) -> np.ndarray:
    """Unicode code points of `text`, u32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer:
    """One token per character; a token's id is the character's place in `characters`.

    Source: the lecture's `stoi` and `itos`.

    Attributes:
      start: what an empty prompt stands for: a newline, or else the first character.
      end_of_text: None, as no character ends a document.
    """

    end_of_text = None

    def __init__(self, characters: str):
        """Takes the vocabulary in id order; raises ValueError if one occurs twice."""
        if not characters or len(set(characters)) != len(characters):
            raise ValueError(
                f"no vocabulary of distinct characters: {characters!r:.80}"
            )
        self.characters = characters
        self.start = "\n" if "\n" in characters else characters[0]
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

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of a text that comes in chunks; together they are its own."""
        return map(self.encode, chunks)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; raises IndexError on an id outside the vocabulary."""
        array = np.array(list(ids), np.int64).astype(np.uint32)  # no negative index
        return self._codepoints[array].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """As `decode`, in UTF-8."""
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> str:
        """The tokenizer as JSON."""
        return json.dumps({"type": "char", "characters": self.characters})

    def save(self, path: Path) -> None:
        """Writes the tokenizer as JSON, which `load_tokenizer` reads."""
        path.write_text(self.to_json(), encoding="utf-8")


class BPETokenizer:
    """Byte-level byte pair encoding, as GPT-2's: any text, and no unknown token.

    Encoding is tiktoken's `encode_ordinary`: END_OF_TEXT in a text is text like any
    other. A token may be part of a character.

    Source: Sennrich et al. 2016, section 3.2; GPT-2, section 2.2.

    Attributes:
      start: what an empty prompt stands for: a newline.
      end_of_text: id of END_OF_TEXT, which parts documents; None if there is none.
      vocab_size: number of token ids.
    """

    start = "\n"

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Takes a tokenizer of the form that `from_tables` makes."""
        tokenizer.encode_special_tokens = True  # as if they were ordinary text
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        vocab = tokenizer.get_vocab()
        alphabet = _byte_alphabet()
        self.vocab_size = max(vocab.values()) + 1
        if not alphabet.keys() <= vocab.keys() or self.vocab_size > 2 * len(vocab):
            raise ValueError("it lacks tokens of single bytes, or its ids have gaps")
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)
        self._tokenizer = tokenizer
        self._bytes = {}
        for token, id_ in vocab.items():
            letters = (alphabet[letter] for letter in token)
            self._bytes[id_] = token.encode() if id_ in added else bytes(letters)

    @classmethod
    def from_tables(cls, vocab: Path, merges: Path) -> Self:
        """The tokenizer of two files: vocab.json and merges.txt, by any name.

        Raises ValueError if they are of another form.
        """
        try:
            tokenizer = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([END_OF_TEXT])
            return cls(tokenizer)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{vocab} and {merges} are no tables of byte-level BPE: {error}"
            ) from error

    @classmethod
    def train(cls, chunks: Iterable[str], vocab_size: int) -> Self:
        """Learns the merges of a text: the commonest pair of tokens, again and again.

        Args:
          chunks: the text, in order.
          vocab_size: tokens in all: 256 bytes, the merges, and END_OF_TEXT at last.

        Raises ValueError if vocab_size is below 257, or above what the text gives.
        """
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        segments = (segment for batch in _segments(chunks) for segment in batch)
        tokenizer.train_from_iterator(segments, trainer)
        tokenizer.add_special_tokens([END_OF_TEXT])
        if (nearest := tokenizer.get_vocab_size()) != vocab_size:
            raise ValueError(
                f"the text does not give vocab_size={vocab_size}, the nearest is "
                f"{nearest}; give that to --model.vocab-size"
            )
        return cls(tokenizer)

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """The tokenizer of a tokenizer.json as the library `tokenizers` writes it.

        Raises ValueError if it is not GPT-2's kind.
        """
        found = json.loads(content)
        model, before = found["model"], found["pre_tokenizer"] or {}
        options = ["dropout", "ignore_merges", "byte_fallback"]
        options += ["continuing_subword_prefix", "end_of_word_suffix"]
        gpt2s = (
            model.get("type", "BPE") == "BPE"  # GPT-2's own has no type
            and not any(map(model.get, options))
            and found["normalizer"] is None
            and before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and not before["add_prefix_space"]
        )
        if not gpt2s:
            raise ValueError("it does not split text as GPT-2's byte-level BPE does")
        for token in found["added_tokens"]:
            token["special"] = True  # so that `__init__` makes text of them all
        return cls(tokenizers.Tokenizer.from_str(json.dumps(found)))

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, i32 [tokens]; half a surrogate pair becomes U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return np.concatenate(list(self.encode_chunks([text])))

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of a text that comes in chunks; together they are its own."""
        encode = partial(self._tokenizer.encode_batch_fast, add_special_tokens=False)
        for encodings in map(encode, _segments(chunks)):
            yield np.concatenate([np.array(e.ids, np.int32) for e in encodings])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are no whole character become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of token ids, which may begin and end inside a character.

        An id that no token has, but an embedding table with rows to spare has, gives
        U+FFFD.
        """
        unknown = "\ufffd".encode()
        return b"".join(self._bytes.get(id_, unknown) for id_ in ids)

    def to_json(self) -> str:
        """The tokenizer as JSON, in the form of the library `tokenizers`."""
        return self._tokenizer.to_str()

    def save(self, path: Path) -> None:
        """Writes the tokenizer as JSON, which `load_tokenizer` reads."""
        path.write_text(self.to_json(), encoding="utf-8")


Tokenizer = CharTokenizer | BPETokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json; raises ValueError that names a file of another form."""
    content = path.read_bytes()
    try:
        values = json.loads(content)
        if "model" in values:
            return BPETokenizer.from_json(content)
        return CharTokenizer(values["characters"])
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer of jaxgpt: {error}") from error


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """As `encode`, but END_OF_TEXT is the token that parts documents, if there is one.

    Source: nanoGPT sample.py.
    """
    if tokenizer.end_of_text is None:
        return tokenizer.encode(text)
    end = np.array([tokenizer.end_of_text], np.int32)
    documents = map(tokenizer.encode, text.split(END_OF_TEXT))
    return np.concatenate([part for ids in documents for part in (end, ids)][1:])


def fits(tokenizer: Tokenizer, vocab_size: int | None) -> bool:
    """Whether a model of `vocab_size` tokens can use the tokenizer.

    An embedding table may have rows to spare for BPE: nanoGPT's has 50,304 for GPT-2's
    50,257 tokens.
    """
    if isinstance(tokenizer, CharTokenizer):
        return tokenizer.vocab_size == vocab_size
    return vocab_size is not None and tokenizer.vocab_size <= vocab_size


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Which byte each letter of a token stands for.

    Source: GPT-2 encoder.py. Printable bytes are their own letters; the others come
    after all of them, so that no token holds a space or a control character.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _segments(chunks: Iterable[str]) -> Iterator[list[str]]:
    """Cuts a text into segments whose tokens, one after the other, are the text's own.

    Yields lists of them; only a text without blanks and newlines is held in full.
    """
    held = ""
    for chunk in chunks:
        held, segments = held + chunk, []
        start = 0
        while match := _BOUNDARY.search(held, start + _SEGMENT):
            segments.append(held[start : match.start()])
            start = match.start()
        held = held[start:]
        if segments:
            yield segments
    yield [held]
