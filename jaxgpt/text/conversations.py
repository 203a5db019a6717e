"""Conversations: the chat format, files of them, and their rows.

A conversation becomes the tokens

    <|endoftext|><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>

with any tokenizer; the system turn is optional, and others may follow. The text of a
message is always text, even where it spells a special token.

T time (block_size)   P pieces
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Config, DataConfig
from jaxgpt.text import chitchat, tasks
from jaxgpt.text.packing import PackedDocuments, fill_rows
from jaxgpt.text.tables import (
    SPLITS,
    Log,
    Row,
    Table,
    check_files,
    digest_files,
    encode_known,
    read_text,
    splits_of,
)
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    token_dtype,
    without_surrogates,
)

ROLES = ("system", "user", "assistant")
END_OF_TURN = "<|end|>"
CHAT_TOKENS = (END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END_OF_TURN)
# What a prediction counts as, in `PackedDocuments.parts`.
CONTEXT, ANSWER, ANSWER_END = range(3)
_FRACTION = 0.05  # of the conversations, for each of val and test


class Message(NamedTuple):
    """A turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


def is_chat_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the special tokens of the chat format."""
    return set(CHAT_TOKENS) <= set(tokenizer.special)


def check_messages(messages: Any, last: str = "assistant") -> list[Message]:
    """Checks a conversation given as JSON has it; returns its messages.

    Args:
      messages: a list of objects with the strings "role" and "content": at most one
        system message, then user and assistant in turn.
      last: role of the last message.

    Raises ValueError that names the first message that does not fit.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError("messages must be a list with at least one message")
    found: list[Message] = []
    for number, each in enumerate(messages, 1):
        role, content = (
            (each.get("role"), each.get("content"))
            if isinstance(each, dict)
            else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f'message {number} must be like {{"role": "user", "content": "..."}}'
            )
        if role not in ROLES:
            raise ValueError(
                f"message {number} has the role {role!r:.40}; use "
                f"{', '.join(ROLES[:-1])} or {ROLES[-1]}"
            )
        before = found[-1].role if found else ""
        expected = "assistant" if before == "user" else "user"
        if role != expected and not (role == "system" and number == 1):
            raise ValueError(
                f"message {number} is out of order: it has the role {role}, but "
                f"{f'after {before} comes' if before else 'a conversation begins with'}"
                f" {expected}"
            )
        if not content.strip():
            raise ValueError(f"message {number}, of the {role}, is empty; remove it")
        found.append(Message(role, without_surrogates(content)))
    if found[-1].role != last:
        raise ValueError(
            f"the last message is the {found[-1].role}'s, not the {last}'s; "
            + ("add an answer, or remove it" if last == "assistant" else "add one")
        )
    return found


def read_conversations(path: Path) -> Iterator[list[Message]]:
    """Reads JSONL of {"messages": [{"role": ..., "content": ...}, ...]}; see `ROLES`.

    Raises ValueError with file and line if one is no conversation.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        try:
            if not isinstance(row, dict) or "messages" not in row:
                raise ValueError(
                    'a line must be like {"messages": [{"role": "user", "content": '
                    '"..."}, {"role": "assistant", "content": "..."}]}'
                )
            yield check_messages(row["messages"])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error


def open_conversations(data: DataConfig, log: Log) -> Table:
    """Finds a corpus of conversations, without reading it.

    A row is the index of its path, then the roles and the texts of a conversation.
    Raises OSError or ValueError if the files can't be used or fetched.
    """
    paths = check_files(data.path, (".jsonl", ".json"))
    files = paths or [chitchat.find_conversations(log)]

    def read() -> tuple[list[Row], np.ndarray]:
        rows: list[Row] = [
            (str(n), *(text for message in conversation for text in message))
            for n, path in enumerate(files)
            for conversation in read_conversations(path)
        ]
        if not rows:
            raise ValueError(f"{', '.join(map(str, files))}: there is no conversation")
        return rows, splits_of([json.dumps(row[1:]) for row in rows], _FRACTION)

    return Table(digest_files(paths) if paths else chitchat.SHA256, cache(read))


def encode_turns(
    messages: Sequence[Message], tokenizer: Tokenizer, log: Log | None = None
) -> list[np.ndarray]:
    """Token ids of each turn: the token of its role, its text, and END_OF_TURN.

    Args:
      log: told which characters the tokenizer does not have; they are left out.
    """
    role_ids = {role: tokenizer.special_id(f"<|{role}|>") for role in ROLES}
    end = tokenizer.special_id(END_OF_TURN)
    texts = encode_known([each.content for each in messages], tokenizer, log)
    return [
        np.array([role_ids[message.role], *ids, end], np.int32)
        for message, ids in zip(messages, texts, strict=True)
    ]


def conversation_tokenizer(table: Table, config: Config, log: Log) -> Tokenizer:
    """Makes the tokenizer that `data.tokenizer` names, with the chat's tokens.

    The characters or the BPE are those of the training part.
    """
    read_texts = partial(_training_texts, table)
    key = tasks.key(table, config)
    return tasks.make_tokenizer(read_texts, CHAT_TOKENS, config, log, key)


def _training_texts(table: Table) -> Iterator[str]:
    rows, split_N = table.read()
    for row, split in zip(rows, split_N, strict=True):
        if SPLITS[split] == "train":
            yield from row[2::2]


def tokenize_conversations(
    table: Table, config: Config, tokenizer: Tokenizer, log: Log
) -> tasks.Arrays:
    """Tokenizes a table, unless it is cached; returns what `make_rows` takes.

    These are all tokens and their parts; the start and length of each exchange (a
    user's turn and its answer) and its conversation; and of each conversation the
    length of its system turn (0 if there is none), its split and the index of its path.
    Logs how many messages spell a special token.
    """
    key = tasks.key(table, config, tokenizer.to_json())
    return tasks.cached_arrays(key, partial(_tokenize, table, tokenizer), log)


def _tokenize(table: Table, tokenizer: Tokenizer, log: Log) -> tasks.Arrays:
    rows, split_N = table.read()
    texts = [[*map(Message, row[1::2], row[2::2])] for row in rows]
    messages = [message for each in texts for message in each]
    spelling = sum(
        any(token in message.content for token in tokenizer.special)
        for message in messages
    )
    if spelling:
        log(f"{spelling:,} messages spell a special token, which is text there")
    turns = encode_turns(messages, tokenizer, log)
    parts = [np.full(len(ids), CONTEXT, np.uint8) for ids in turns]
    for message, of_turn in zip(messages, parts, strict=True):
        if message.role == "assistant":
            of_turn[1:-1], of_turn[-1] = ANSWER, ANSWER_END
    lengths = np.array([*map(len, turns)])
    starts, conversation = np.cumsum(lengths) - lengths, np.arange(len(rows))
    conversation = np.repeat(conversation, [*map(len, texts)])
    users = np.flatnonzero([message.role == "user" for message in messages])
    begin_N = starts[np.searchsorted(conversation, np.arange(len(rows)))]
    first_N = users[np.searchsorted(conversation[users], np.arange(len(rows)))]
    return {
        "tokens": np.concatenate(turns).astype(token_dtype(tokenizer.vocab_size)),
        "parts": np.concatenate(parts),
        "starts": starts[users],
        "lengths": lengths[users] + lengths[users + 1],
        "conversation": conversation[users],
        "begin": begin_N,
        "system": starts[first_N] - begin_N,
        "split": split_N,
        "path": np.array([int(row[0]) for row in rows]),
    }


def make_rows(
    arrays: tasks.Arrays,
    config: Config,
    tokenizer: Tokenizer,
    split: str,
    log: Log,
    path: int | None = None,
) -> PackedDocuments:
    """Packs the conversations of "train", "val", "test" or "all" into rows.

    Those longer than block_size are cut where an exchange ends, and each piece begins
    with the system turn. An exchange that does not fit alone is left out. Logs how many
    there are of both.

    Args:
      arrays: of `tokenize_conversations`.
      path: index of the only path to take; None takes all.

    Raises ValueError if there are none.
    """
    T, starts, lengths = config.model.block_size, arrays["starts"], arrays["lengths"]
    of_exchange, begin_N, system_N = (
        arrays[name] for name in ("conversation", "begin", "system")
    )
    keep_N = np.ones(len(system_N), bool)
    if split in SPLITS:
        keep_N = arrays["split"] == SPLITS.index(split)
    if path is not None:
        keep_N &= arrays["path"] == path
    keep = keep_N[of_exchange]
    fits = system_N[of_exchange] + lengths <= T
    exchanges = np.flatnonzero(keep & fits)
    if not len(exchanges):
        name = "" if path is None else f" of {config.data.path[path]}"
        raise ValueError(
            f"the {split} split{name} has no conversation that fits block_size={T}; "
            "give more, since each one's hash determines its split, or raise "
            "--model.block-size"
        )
    follows = (np.diff(exchanges) == 1) & (np.diff(of_exchange[exchanges]) == 0)
    runs = np.split(exchanges, np.flatnonzero(~follows) + 1)
    systems = [int(system_N[of_exchange[run[0]]]) for run in runs]
    rows = fill_rows([lengths[run].tolist() for run in runs], systems, T)
    slices, lengths_P = list[slice](), list[int]()
    for run, start, stop in (piece for row in rows for piece in row):
        first, last = runs[run][start], runs[run][stop - 1]
        begin, system = begin_N[of_exchange[first]], systems[run]
        end = starts[last] + lengths[last]
        slices += slice(begin, begin + system), slice(starts[first], end)
        lengths_P.append(int(end - starts[first]) + system)
    count = np.count_nonzero(keep_N)
    total_N = system_N + np.bincount(of_exchange, lengths, len(system_N))
    if cut := int((keep_N & (total_N > T)).sum()):
        log(
            f"{cut:,} of {count:,} conversations are longer than block_size={T}: they "
            f"are cut at turns; {(keep & ~fits).sum():,} exchanges that do not fit "
            "alone are left out"
        )
    log(
        f"packed {count:,} conversations of the {split} split into {len(rows):,} rows, "
        f"{sum(lengths_P) / (len(rows) * T):.1%} full"
    )
    return PackedDocuments(
        np.concatenate([arrays["tokens"][each] for each in slices]),
        tokenizer.special_id(END_OF_TEXT),
        T,
        True,
        np.cumsum(lengths_P) - lengths_P,
        np.array(lengths_P),
        np.ones(len(lengths_P), bool),
        np.cumsum([0, *map(len, rows)]),
        np.concatenate([arrays["parts"][each] for each in slices]),
    )
