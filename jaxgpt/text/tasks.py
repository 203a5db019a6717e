"""What the workers of `prepare` do with a block of documents.

A document's identity is the first 16 bytes of the sha256 of its UTF-8 text, as two
big-endian integers: the first decides its split, the second whether BPE learns from it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgpt.text.documents import Block, Document, Position, parse
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
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
    """What every task returns of a block, besides its results."""

    end: Position
    stored: int  # bytes
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
      sha256: of each file that ends with the block.
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


def tokenize(block: Block, tokenizer: Path, fast: bool) -> tuple[Read, Tokenized]:
    """Tokenizes a block; an end token follows each document.

    Args:
      tokenizer: path of the tokenizer.json.
      fast: whether to use `tiktoken_encode`.
    """
    encode, end, dtype = _load(tokenizer, fast)
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
        [sha256_of(path) for path in block.paths] if block.ends else [],
        utf8_bytes,
        end_of_texts,
    )
    return _read(block, documents), result


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(block: Block, documents: list[Document]) -> Read:
    problems = [document for document in documents if document.problem]
    return Read(block.end, block.stored, problems)


@cache
def _load(
    path: Path, fast: bool
) -> tuple[Callable[[str], np.ndarray], np.ndarray, np.dtype]:
    """Loads a tokenizer: its `encode`, its end token, and the dtype of its shards."""
    tokenizer = load_tokenizer(path)
    encode = tiktoken_encode(tokenizer) if fast else tokenizer.encode
    end = np.array([tokenizer.end_of_text])
    return encode, end, token_dtype(tokenizer.vocab_size)


def tiktoken_encode(tokenizer: Tokenizer) -> Callable[[str], np.ndarray]:
    """Returns a faster function for a BPE tokenizer's `encode`.

    The tokenizer must have been trained as BPE is, with ids in the order of the merges
    and the end token last, as GPT-2's and those of `BPETokenizer.train` are. Then there
    is one way only to merge two tokens to a third, so that the ids are the same though
    tiktoken knows the tokens but not the merges.
    """
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
