"""Words of random letters and their reversals, made by hashing numbers."""

import hashlib

import numpy as np

from jaxgpt.text.tables import Row, split_of

# Of the lines `WORD INDEX_OF_SPLIT`.
SHA256 = "f47555c896e1044d02ffe7965bd1818a3eeb685ae6c1c39e41c8e2b0fbc96f17"
VOCAB_SIZE = 27  # letters, and the end-of-text token
_LONGEST = 20  # letters
_DRAWS = 60_000
_FRACTION = 2_000 / 54_000  # for each of val and test
_SHARED = 3  # letters; there are too few words of up to as many for one split only


def make_pairs() -> tuple[list[Row], np.ndarray]:
    """Makes rows (word, reversed word), and the index of each one's split.

    Lengths are uniform from 1 to 20, but no word is twice in a split. Those of 4
    letters and more are in one split only, together with their reversals.
    """
    found: dict[tuple[str, int], None] = {}
    for n in range(_DRAWS):
        word = _word(n)
        key = str(n) if len(word) <= _SHARED else min(word, word[::-1])
        found[word, split_of(key, _FRACTION)] = None
    pairs: list[Row] = [(word, word[::-1]) for word, _ in found]
    return pairs, np.array([split for _, split in found], np.uint8)


def _word(n: int) -> str:
    digest = int.from_bytes(hashlib.sha256(str(n).encode()).digest())
    rest, length = divmod(digest, _LONGEST)
    letters = []
    for _ in range(1 + length):
        rest, letter = divmod(rest, 26)
        letters.append(chr(ord("a") + letter))
    return "".join(letters)
