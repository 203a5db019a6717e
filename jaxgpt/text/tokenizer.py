"""Tokenizers: one token per character, or byte-level BPE."""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxgpt.exits import interruptible

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"  # replaces the tokens to predict in masked language modelling
_LETTERS = r"0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"  # and digits
_PUNCTUATION = r"!-/:-@\[-\^`{-~\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
# A position that no token of GPT-2's pattern spans, whatever the text around it: before
# whitespace, or between a letter or a digit and punctuation. Only characters on whose
# kind all versions of Unicode agree.
_BOUNDARY = re.compile(rf"(?<=\S)(?=[ \t\r\n])|(?<=[{_LETTERS}])(?=[{_PUNCTUATION}])")
_SEGMENT = 1 << 16  # characters; the segments of a text are encoded in parallel
_BATCH = 1000  # texts that are encoded in parallel
_LONGEST_SEGMENT = 1 << 20  # characters; it is cut there if it has no boundary
# Bytes; training takes quadratic time in the length of a word. On 2 cores, 3 MB of DNA
# without whitespace take 6 s with words of 256 bytes, 12 s with 64, 7 s with 1,024.
_LONGEST_WORD = 256


def codepoints(text: str) -> np.ndarray:
    """Unicode code points of `text`, u32 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class CharTokenizer:
    """One token per character; a token's id is the character's index in `characters`.

    Special tokens, such as END_OF_TEXT, have the ids after the characters. In `encode`
    they are text like any other.

    Source: the lecture's `stoi` and `itos`.

    Attributes:
      start: replaces an empty prompt: a newline, or else the first character.
      end_of_text: id of END_OF_TEXT, which separates documents; None if there is none.
      special: the special tokens.
    """

    def __init__(self, characters: str, special: Sequence[str] = ()):
        """Takes the characters and the special tokens in id order.

        Raises ValueError if a token occurs twice.
        """
        self._tokens = [*characters, *special]
        distinct = {token for token in self._tokens if isinstance(token, str) and token}
        if not characters or len(distinct) != len(self._tokens):
            raise ValueError(
                f"a vocabulary needs distinct characters, not {self._tokens!r:.80}"
            )
        self.characters, self.special = characters, tuple(special)
        self.end_of_text = None
        if END_OF_TEXT in special:
            self.end_of_text = self._tokens.index(END_OF_TEXT)
        self.start = "\n" if "\n" in characters else characters[0]
        self._ids = np.full(0x110000, -1, np.int32)  # indexed by code point
        self._ids[codepoints(characters)] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Makes a tokenizer of the sorted distinct characters of `text`."""
        return cls("".join(sorted(set(text))))

    def with_special(self, tokens: Sequence[str]) -> "CharTokenizer":
        """A tokenizer that also has these special tokens, after the others."""
        missing = [token for token in tokens if token not in self.special]
        return CharTokenizer(self.characters, [*self.special, *missing])

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return len(self._tokens)

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, i32 [len(text)].

        Raises ValueError that names the first character outside the vocabulary.
        """
        ids = self._ids[codepoints(text)]
        if len(ids) and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            raise ValueError(
                f"character {text[position]!r} at position {position} is not in the "
                f"vocabulary of {len(self.characters)} characters: {self.characters!r}"
            )
        return ids

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the token ids of a text given in chunks, the same as for the whole."""
        return map(self.encode, chunks)

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        return list(map(self.encode, texts))

    def special_id(self, token: str) -> int:
        """The id of a special token."""
        return self._tokens.index(token)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Like `encode`, but special tokens are tokens."""
        longest_first = sorted(self.special, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        texts, tokens = re.split(pattern, text), re.findall(pattern, text)
        ids = [self.encode(texts[0])]
        for token, after in zip(tokens, texts[1:], strict=True):
            ids += [np.array([self._tokens.index(token)]), self.encode(after)]
        return np.concatenate(ids).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; raises IndexError on an id outside the vocabulary."""
        array = np.array(list(ids), np.int64).astype(np.uint32)  # negative ids raise
        return "".join(map(self._tokens.__getitem__, array.tolist()))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of token ids; raises IndexError like `decode`."""
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> str:
        """The tokenizer as JSON."""
        values = {"type": "char", "characters": self.characters}
        return json.dumps(values | ({"special": self.special} if self.special else {}))

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as JSON, which `load_tokenizer` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


class BPETokenizer:
    """Byte-level byte pair encoding as in GPT-2, which can encode any text.

    `encode` is for documents, like tiktoken's `encode_ordinary`: special tokens in a
    text, such as END_OF_TEXT, are ordinary text. Tokens that were added to an imported
    tokenizer without being special are tokens there too. A token may be part of a
    character. A text is cut after 2^20 characters without whitespace or punctuation,
    since merging takes the longest stretch as a whole.

    Source: Sennrich et al. 2016, section 3.2; GPT-2, section 2.2.

    Attributes:
      start: replaces an empty prompt: a newline.
      end_of_text: id of END_OF_TEXT, which separates documents; None if there is none.
      special: the special tokens.
      vocab_size: number of token ids.
    """

    start = "\n"

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Takes a byte-level BPE tokenizer, as `from_tables` makes it."""
        if tokenizer.token_to_id(END_OF_TEXT) is not None:
            tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.encode_special_tokens = True  # as ordinary text
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
        self._added = [token.content for token in added.values()]
        self._special = {each.content: i for i, each in added.items() if each.special}
        self.special = tuple(self._special)
        if all(token.special for token in added.values()):
            self._added = []  # special tokens alone are ordinary text
        self._bytes = {}
        for token, id_ in vocab.items():
            byte_values = (alphabet[letter] for letter in token)
            self._bytes[id_] = token.encode() if id_ in added else bytes(byte_values)

    @classmethod
    def from_tables(cls, vocab: Path, merges: Path) -> Self:
        """Loads a tokenizer from a vocab.json and a merges.txt, whatever their names.

        Raises ValueError if they are not tables of byte-level BPE.
        """
        try:  # not `BPE.from_file`, which takes only paths and texts in plain UTF-8
            lines = merges.read_bytes().decode("utf-8-sig").split("\n")
            lines = [line for line in lines if line and line[:8] != "#version"]
            pairs: Any = [tuple(line.split()) for line in lines]
            return cls(_byte_level(models.BPE(json.loads(vocab.read_bytes()), pairs)))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(
                f"{vocab} and {merges} are not tables of byte-level BPE: {error}"
            ) from error

    @classmethod
    def train(
        cls,
        chunks: Iterable[str],
        vocab_size: int,
        documents: bool = False,
        special: Sequence[str] = (END_OF_TEXT,),
    ) -> Self:
        """Learns merges from a text by repeatedly merging the most frequent pair.

        Words are cut after 256 bytes, so that the time is linear in the text. Shows a
        progress bar if stderr is a terminal.

        Args:
          chunks: the text, in order.
          vocab_size: total number of tokens: 256 bytes, the merges, the special ones.
          documents: whether each chunk is a document, at whose end words end too.
          special: the special tokens, in id order.

        Raises ValueError if vocab_size is too small for these, or too large for the
        text.
        """
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        texts = ([chunk] for chunk in chunks) if documents else iter([chunks])
        batches = (batch for text in texts for batch in segments(text))
        words = tokenizer.pre_tokenizer
        cut = pre_tokenizers.FixedLength(_LONGEST_WORD)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
        interruptible(partial(tokenizer.train_from_iterator, batches, trainer))
        tokenizer.pre_tokenizer = words
        tokenizer.add_special_tokens(list(special))
        if (nearest := tokenizer.get_vocab_size()) != vocab_size:
            raise ValueError(
                f"the text does not yield vocab_size={vocab_size} tokens; the nearest "
                f"possible is --model.vocab-size {nearest} (prepare: --vocab-size)"
            )
        return cls(tokenizer)

    @classmethod
    def from_json(cls, content: bytes) -> Self:
        """Loads a tokenizer.json in the format of the library `tokenizers`.

        Raises ValueError if it is not byte-level BPE as in GPT-2.
        """
        values = json.loads(content)
        model, pre_tokenizer = values["model"], values["pre_tokenizer"] or {}
        options = ["dropout", "ignore_merges", "byte_fallback"]
        options += ["continuing_subword_prefix", "end_of_word_suffix"]
        is_gpt2 = (
            model.get("type", "BPE") == "BPE"  # absent in GPT-2's own file
            and not any(map(model.get, options))
            and values["normalizer"] is None
            and pre_tokenizer.get("type") == "ByteLevel"
            and pre_tokenizer.get("use_regex", True)
            and not pre_tokenizer["add_prefix_space"]
        )
        if not is_gpt2:
            raise ValueError("it does not split text as GPT-2's byte-level BPE does")
        return cls(tokenizers.Tokenizer.from_str(content.decode("utf-8-sig")))

    def with_special(self, tokens: Sequence[str]) -> "BPETokenizer":
        """A tokenizer that also has these special tokens, after the others."""
        copy = tokenizers.Tokenizer.from_str(self.to_json())
        copy.add_special_tokens(list(tokens))  # those it has keep their ids
        return BPETokenizer(copy)

    def special_id(self, token: str) -> int:
        """The id of a special token."""
        return self._special[token]

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, i32 [tokens]; unpaired surrogates become U+FFFD."""
        return np.concatenate(list(self.encode_chunks([without_surrogates(text)])))

    def encode_chunks(self, chunks: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the token ids of a text given in chunks, the same as for the whole."""
        encode = partial(self._tokenizer.encode_batch_fast, add_special_tokens=False)
        for batch in segments(chunks, self._added):
            encodings = interruptible(partial(encode, batch))
            yield np.concatenate([np.array(e.ids, np.int32) for e in encodings])

    def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Token ids of each text."""
        encode = partial(self._tokenizer.encode_batch_fast, add_special_tokens=False)
        texts, encoded = list(map(without_surrogates, texts)), []
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            encodings = interruptible(partial(encode, batch))
            encoded += [np.array(each.ids, np.int32) for each in encodings]
        return encoded

    @cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        """A copy that also encodes special tokens as tokens, as is the default."""
        return tokenizers.Tokenizer.from_str(self.to_json())

    def encode_prompt(self, text: str) -> np.ndarray:
        """Like `encode`, but added tokens are tokens, special or not.

        The ids are those of a call of transformers' tokenizer.
        """
        text = without_surrogates(text)
        encode = partial(self._parser.encode_batch, [text])  # `encode` holds the GIL
        return np.array(interruptible(encode)[0].ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; incomplete characters become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes of token ids, which may begin and end inside a character.

        Ids without a token, which models with spare rows in the embedding table can
        sample, become U+FFFD.
        """
        unknown = "\ufffd".encode()
        return b"".join(self._bytes.get(id_, unknown) for id_ in ids)

    def to_json(self) -> str:
        """The tokenizer as JSON, in the format of the library `tokenizers`."""
        return self._tokenizer.to_str()

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer as JSON, which `load_tokenizer` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


Tokenizer = CharTokenizer | BPETokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    """Dtype of the token files: u16 as in nanoGPT, u32 for larger vocabularies."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer.json; raises ValueError that names a file it can't use."""
    content = path.read_bytes()
    try:
        values = json.loads(content)
        if "model" in values:
            return BPETokenizer.from_json(content)
        return CharTokenizer(values["characters"], values.get("special", ()))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a valid tokenizer: {error}") from error


def fits(tokenizer: Tokenizer, vocab_size: int | None) -> bool:
    """Whether a model of `vocab_size` tokens can use the tokenizer.

    With BPE the embedding table may have spare rows: nanoGPT's has 50,304 for GPT-2's
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
    """Maps each letter of a token to the byte it stands for.

    Source: GPT-2 encoder.py. Printable bytes are their own letters; the others map to
    U+0100 and above, so that no token contains a space or a control character.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def without_surrogates(text: str) -> str:
    """The text with unpaired surrogates replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def segments(chunks: Iterable[str], added: Sequence[str] = ()) -> Iterator[list[str]]:
    """Splits a text into segments that can be tokenized on their own; yields lists.

    A boundary near one of the added tokens is not used, since the token might reach
    over it. The segments depend on the text alone, not on the chunks.
    """
    reach = max(map(len, added), default=0)
    tokens = re.compile("|".join(map(re.escape, added)) or r"(?!)")
    rest, start = "", 0

    def end() -> int:
        """Where the segment that begins at `start` ends; 0 if more text decides it."""
        last = start + _LONGEST_SEGMENT
        for match in _BOUNDARY.finditer(rest, start + _SEGMENT, last):
            position = match.start()
            if position + reach > len(rest):
                return 0
            if not tokens.search(rest, max(0, position - reach), position + reach):
                return position
        return last if last + reach <= len(rest) else 0

    for chunk in chunks:
        rest, start, batch = rest[start:] + chunk, 0, []
        while stop := end():
            batch.append(rest[start:stop])
            start = stop
        if batch:
            yield batch
    yield [rest[start:]]
