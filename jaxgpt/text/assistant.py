"""The corpus of an assistant: instructions with exact answers, and small talk.

A conversation has one to three exchanges, each with a task of `instructions` or the
beginning of one of the chit-chat conversations.
"""

import hashlib
import json
from functools import cache
from itertools import islice
from random import Random

import numpy as np

from jaxgpt.text import chitchat
from jaxgpt.text.conversations import read_conversations
from jaxgpt.text.instructions import Task, make_task
from jaxgpt.text.tables import SPLITS, Log, Row, Table, join_digests, splits_of

VOCAB_SIZE = 91  # characters, and the special tokens
_SEED = 0
_TASKS = 60_000
_EXCHANGES = 1, 1, 1, 2, 3  # of a conversation, each as likely
_LONGEST = 60  # characters of small talk
_FRACTION = 0.1  # of the small talk, for each of val and test


@cache
def make_tasks(held_out: bool) -> list[Task]:
    """The tasks of the corpus, or as many with phrasings that it lacks."""
    return [make_task(_SEED, index, held_out) for index in range(_TASKS)]


def open_assistant(kind: str, log: Log) -> Table:
    """Finds the corpus, as "prompts" or as "conversations"; see these modules.

    Prompts are the instructions alone. Raises OSError if the small talk can't be
    fetched.
    """
    settings = [_SEED, _EXCHANGES, _LONGEST, _FRACTION, make_tasks(False)]
    sha256 = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if kind == "prompts":
        return Table(sha256, _read_prompts)
    path = chitchat.find_conversations(log)

    def read() -> tuple[list[Row], np.ndarray]:
        openings = set[tuple[str, str]]()
        for first, answer, *_ in read_conversations(path):
            texts = first.content, answer.content
            if all(text.isascii() and len(text) <= _LONGEST for text in texts):
                openings.add(texts)
        talk, tasks = sorted(openings), make_tasks(False)
        exchanges = [(task.instruction, task.demonstration) for task in tasks] + talk
        split_N = [task.split for task in tasks]
        split_N += splits_of([first for first, _ in talk], _FRACTION).tolist()
        rows, splits, rng = list[Row](), list[int](), Random(_SEED)
        for split in range(len(SPLITS)):
            of_split = [
                e for e, s in zip(exchanges, split_N, strict=True) if s == split
            ]
            rng.shuffle(of_split)
            rest = iter(of_split)
            while found := [*islice(rest, rng.choice(_EXCHANGES))]:
                rows.append(("0", *(text for exchange in found for text in exchange)))
                splits.append(split)
        return rows, np.array(splits, np.uint8)

    return Table(join_digests([sha256, chitchat.SHA256]), read)


def _read_prompts() -> tuple[list[Row], np.ndarray]:
    tasks = make_tasks(False)
    rows: list[Row] = [(json.dumps([("user", t.instruction)]),) for t in tasks]
    return rows, np.array([task.split for task in tasks], np.uint8)
