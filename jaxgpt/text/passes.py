"""The passes of `prepare` over documents: what a worker makes of a block.

A document's identity is the first 16 bytes of the sha256 of its UTF-8 text, as two
big-endian integers: the first decides its split, the second whether BPE learns from it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import models

from jaxgpt.text.documents import Block, Document, Position, parse
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    segments,
    token_dtype,
)

# Tokens of a document, and of a shard when it is closed, so that positions are u32.
LONGEST = 1 << 31
# OpenAI's form of the pattern in GPT-2's encoder.py, which splits alike but faster.
_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)


class Read(NamedTuple):
    """What every pass returns of a block, besides its results."""

    end: Position
    problems: list[Document]


class Sample(NamedTuple):
    """A document that BPE may learn from; the lowest `order` are taken."""

    order: int
    digest: bytes
    utf8: bytes


@dataclass(frozen=True)
class Tokenized:
    """The documents of a block.

    Attributes:
      ids: the tokens of all documents, u16 or u32 [tokens].
      lengths: their number for each document, with the end token, i64 [documents].
      digests: 16 bytes for each document, big-endian u64 [documents, 2].
      sources: (documents, skipped) of each of the block's files.
      sha256: of each file that ends with the block; see `input_sha256`.
      utf8_bytes, end_of_texts: size of the text, and how often it has END_OF_TEXT.
    """

    ids: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    sources: list[tuple[int, int]]
    sha256: list[str]
    utf8_bytes: int
    end_of_texts: int


def digest_of(utf8: bytes) -> bytes:
    """The 16 bytes that identify a document."""
    return hashlib.sha256(utf8).digest()[:16]


def find_characters(block: Block) -> tuple[Read, str]:
    """Returns the distinct characters of the documents of a block."""
    documents = list(parse(block))
    found = "".join(set().union(*(document.text for document in documents)))
    return _read(block, documents), found


def sample(
    task: tuple[Block, int], val_below: int, limit: int
) -> tuple[Read, list[Sample]]:
    """Returns training documents below a bound, each cut after `limit` bytes.

    Args:
      task: the block, and the bound of `Sample.order`.
      val_below: documents whose first integer is below this one are for validation.
    """
    block, below = task
    documents, found = list(parse(block)), []
    for document in documents:
        utf8 = document.text.encode()
        digest = digest_of(utf8)
        split, order = (int.from_bytes(half) for half in (digest[:8], digest[8:]))
        if not document.problem and split >= val_below and order < below:
            found.append(Sample(order, digest, utf8[:limit]))
    return _read(block, documents), found


def tokenize(block: Block, tokenizer: Path) -> tuple[Read, Tokenized]:
    """Tokenizes a block with a tokenizer.json; an end token follows each document."""
    encode, end, dtype = _load(tokenizer)
    documents, ids, lengths, digests = [], [], [], []
    sources = [[0, 0] for _ in block.paths]
    utf8_bytes = end_of_texts = 0
    for document in parse(block):
        if not document.problem:
            try:
                tokens = encode(document.text)
                if len(tokens) >= LONGEST:
                    raise ValueError(f"{len(tokens):,} tokens are too many; cut it")
            except ValueError as error:
                detail = str(error)
                document = document._replace(problem="no tokens", detail=detail)
        sources[document.file][bool(document.problem)] += 1
        if document.problem:
            documents.append(document)
            continue
        utf8 = document.text.encode()
        ids += [tokens, end]
        lengths.append(len(tokens) + 1)
        digests.append(digest_of(utf8))
        utf8_bytes += len(utf8)
        end_of_texts += document.text.count(END_OF_TEXT)
    none = [np.empty(0, dtype)]
    result = Tokenized(
        np.concatenate(ids or none, dtype=dtype, casting="unsafe"),
        np.array(lengths, np.int64),
        np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2),
        [(used, skipped) for used, skipped in sources],
        [input_sha256(path) for path in block.paths] if block.ends else [],
        utf8_bytes,
        end_of_texts,
    )
    return _read(block, documents), result


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_sha256(path: Path) -> str:
    """Like `sha256_of`, but "" if the file can't be read, as one that is skipped."""
    try:
        return sha256_of(path)
    except OSError:
        return ""


def _read(block: Block, documents: list[Document]) -> Read:
    problems = [document for document in documents if document.problem]
    return Read(block.end, problems)


@cache
def _load(path: Path) -> tuple[Callable[[str], np.ndarray], np.ndarray, np.dtype]:
    """Loads a tokenizer: its `encode`, its end token, and the dtype of its shards."""
    tokenizer = load_tokenizer(path)
    fast = suits_tiktoken(tokenizer)
    encode = tiktoken_encode(tokenizer) if fast else tokenizer.encode
    end = np.array([tokenizer.end_of_text])
    return encode, end, token_dtype(tokenizer.vocab_size)


def suits_tiktoken(tokenizer: Tokenizer) -> bool:
    """Whether `tiktoken_encode` gives the tokenizer's ids, as for GPT-2's.

    tiktoken knows the tokens but not the merges: of neighbours that make up a token, it
    merges those of the lowest id. So the ids must be in the order of the merges, after
    the bytes and before the end token, and the merges must make each token of its own
    text. Then two neighbours that make up a token, when no lower merge is left, are
    those of its merge, since no merge has reached over their ends.
    """
    if isinstance(tokenizer, CharTokenizer):
        return False
    values = json.loads(tokenizer.to_json())
    vocab, merges = values["model"]["vocab"], values["model"]["merges"]
    last = tokenizer.vocab_size - 1
    added = [(token["content"], token["id"]) for token in values["added_tokens"]]
    made = ["".join(pair) for pair in merges]
    if added != [(END_OF_TEXT, last)] or [*map(vocab.get, made)] != [*range(256, last)]:
        return False
    merge = models.BPE(vocab, [tuple(pair) for pair in merges]).tokenize
    return all(
        max(vocab[left], vocab[right]) < vocab[token] == merge(token)[0].id
        for (left, right), token in zip(merges, made, strict=True)
    )


def tiktoken_encode(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    """Returns a faster function for a tokenizer's `encode`, if `suits_tiktoken`."""
    import tiktoken  # other tokenizers do not need it

    last = tokenizer.vocab_size - 1
    encoding = tiktoken.Encoding(
        "bpe",
        pat_str=_PATTERN,
        mergeable_ranks={tokenizer.decode_bytes([id_]): id_ for id_ in range(last)},
        special_tokens={END_OF_TEXT: last},
    )

    def encode(text: str) -> np.ndarray:
        parts = chain.from_iterable(segments([text]))  # bounds the time of a long word
        ids = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        return np.concatenate(ids)

    return encode
