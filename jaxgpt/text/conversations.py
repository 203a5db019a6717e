"""Conversations: the chat format, files of them, and their rows.

A conversation becomes the tokens

    <|endoftext|><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>

with any tokenizer; the system turn is optional, and others may follow. The text of a
message is always text, even where it spells a special token.

N conversations   T time (block_size)   P pieces
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Config, DataConfig
from jaxgpt.text import chitchat
from jaxgpt.text.packing import PackedDocuments, fill_rows
from jaxgpt.text.tables import (
    SPLITS,
    Log,
    Row,
    Table,
    check_files,
    digest_files,
    encode_known,
    join_digests,
    read_objects,
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
# The format in Jinja, for transformers, where the text of a message is parsed.
CHAT_TEMPLATE = """
{{- "<|endoftext|>" -}}
{%- for message in messages -%}
  {%- set turn = loop.index0 - (messages[0].role == "system") | int -%}
  {%- if turn >= 0 and message.role != ["user", "assistant"][turn % 2] -%}
    {{- raise_exception("after a system message, user and assistant take turns") -}}
  {%- endif -%}
  {{- "<|" + message.role + "|>" + message.content + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""
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
        raise ValueError(
            'a conversation must be like {"messages": [{"role": "user", "content": '
            '"..."}, {"role": "assistant", "content": "..."}]}'
        )
    found: list[Message] = []
    for number, each in enumerate(messages, 1):
        values = each if isinstance(each, dict) else {}
        for name in Message._fields:
            if not isinstance(value := values.get(name), str):
                raise ValueError(
                    f'message {number} must be like {{"role": "user", "content": '
                    f'"..."}}, where {name} is text, not {type(value).__name__}'
                )
        role, content = values["role"], values["content"]
        if role not in ROLES:
            raise ValueError(
                f"message {number} has the role {role[:40]!r}; use {', '.join(ROLES)}"
            )
        expected = "assistant" if found and found[-1].role == "user" else "user"
        if role != expected and (role, number) != ("system", 1):
            raise ValueError(
                f"message {number} has the role {role}, but it is the {expected}'s turn"
            )
        if not content.strip():
            raise ValueError(f"message {number}, of the {role}, is empty; remove it")
        found.append(Message(role, without_surrogates(content)))
    if found[-1].role != last:
        raise ValueError(
            f"the last message is the {found[-1].role}'s, but must be the {last}'s; "
            "add one, or remove it"
        )
    return found


def read_conversations(path: Path) -> Iterator[list[Message]]:
    """Reads JSONL of {"messages": [{"role": ..., "content": ...}, ...]}; see `ROLES`.

    Raises ValueError with file and line if one is no conversation.
    """
    for place, values in read_objects(path):
        try:
            yield check_messages(values.get("messages"))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


def open_conversations(data: DataConfig, log: Log) -> Table:
    """Finds a corpus of conversations, without reading it.

    A row is the index of its path, then the texts of a conversation: an odd number of
    them if it begins with a system turn. Raises OSError or ValueError if the files
    can't be used or fetched.
    """
    paths = check_files(data.path, (".jsonl", ".ndjson"))
    files = paths or [chitchat.find_conversations(log)]

    def read() -> tuple[list[Row], np.ndarray]:
        rows, keys = list[Row](), list[str]()
        for n, path in enumerate(files):
            for conversation in read_conversations(path):
                rows.append((str(n), *(message.content for message in conversation)))
                keys.append(json.dumps([*chain(*conversation)]))
        if not rows:
            raise ValueError(f"{', '.join(map(str, files))}: there is no conversation")
        return rows, splits_of(keys, _FRACTION)

    digests = [digest_files([path]) for path in paths] or [chitchat.SHA256]
    return Table(join_digests(digests), read)


def encode_turns(
    messages: Sequence[Message], tokenizer: Tokenizer, log: Log | None = None
) -> list[np.ndarray]:
    """Token ids of each turn: the token of its role, its text, and END_OF_TURN.

    Args:
      log: told which characters the tokenizer does not have; they are left out.
    """
    ids = {token: [tokenizer.special_id(token)] for token in CHAT_TOKENS}
    begins = {role: np.array(ids[f"<|{role}|>"], np.int32) for role in ROLES}
    end = np.array(ids[END_OF_TURN], np.int32)
    texts = encode_known([each.content for each in messages], tokenizer, log)
    return [
        np.concatenate([begins[message.role], text, end])
        for message, text in zip(messages, texts, strict=True)
    ]


def tokenize(rows: Sequence[Row], tokenizer: Tokenizer, log: Log) -> dict[str, Any]:
    """Tokenizes rows of `open_conversations`; returns what `make_rows` takes.

    These are all tokens and their parts, the offset of each turn, the index of each
    conversation's first turn, and of its path. Logs how many messages spell a special
    token.
    """
    messages = [
        Message(role, text)
        for _, *texts in rows
        for role, text in zip(
            ROLES[: len(texts) % 2] + ROLES[1:] * (len(texts) // 2), texts, strict=True
        )
    ]
    special = re.compile("|".join(map(re.escape, tokenizer.special)))
    if spelling := sum(special.search(each.content) is not None for each in messages):
        log(f"{spelling:,} messages spell a special token, which is text there")
    turns = encode_turns(messages, tokenizer, log)
    offsets = np.cumsum([0, *map(len, turns)])
    answers = np.array([each.role == "assistant" for each in messages])
    parts = np.repeat(np.where(answers, ANSWER, CONTEXT), np.diff(offsets))
    parts[offsets[:-1][answers]] = CONTEXT  # the token of the role
    parts[offsets[1:][answers] - 1] = ANSWER_END
    return {
        "tokens": np.concatenate(turns).astype(token_dtype(tokenizer.vocab_size)),
        "parts": parts.astype(np.uint8),
        "offsets": offsets,
        "first": np.cumsum([0, *(len(row) - 1 for row in rows)]),
        "path": np.array([int(row[0]) for row in rows]),
    }


def make_rows(
    arrays: dict[str, Any],
    config: Config,
    tokenizer: Tokenizer,
    log: Log,
    split: str,
    path: int | None = None,
) -> PackedDocuments:
    """Packs the conversations of "train", "val", "test" or "all" into rows.

    Those longer than block_size are cut between exchanges (a user's turn and its
    answer), and each piece begins with the system turn. An exchange is left out if it
    does not fit alone, or the tokenizer knows nothing of its answer. Logs both counts.

    Args:
      arrays: of `tokenize`, with the index of each conversation's split.
      path: index of the only path to take; None takes all.

    Raises ValueError if there are none.
    """
    T, name = config.model.block_size, f"the {split} split"
    split_N = arrays["split"]
    keep_N = split_N == SPLITS.index(split) if split in SPLITS else split_N >= 0
    if path is not None:
        name += f" of {config.data.path[path]}"
        keep_N &= arrays["path"] == path
    offsets, first = arrays["offsets"], arrays["first"]
    stretches = [
        (n, *stretch)
        for n in np.flatnonzero(keep_N).tolist()
        for stretch in _stretches(offsets[first[n] : first[n + 1] + 1].tolist(), T)
    ]
    if not stretches:
        lack = "conversations; give more, since each one's hash determines its split"
        if keep_N.any():
            lack = f"exchange that fits block_size={T}; raise --model.block-size"
        raise ValueError(f"{name} has no {lack}")
    lengths = [np.diff(starts).tolist() for *_, starts in stretches]
    systems = [system.stop - system.start for _, system, _ in stretches]
    rows = fill_rows(lengths, systems, T)
    placed = [(*stretches[n], i, j) for n, i, j in chain(*rows)]
    pieces = [
        np.r_[system, starts[i] : starts[j]] for _, system, starts, i, j in placed
    ]
    positions, lengths_P = np.concatenate(pieces), np.array([*map(len, pieces)])
    cut = np.count_nonzero(np.diff(offsets[first])[keep_N] > T)
    left_out = (np.diff(first)[keep_N] // 2).sum() - sum(map(len, lengths))
    log(
        f"packed {keep_N.sum():,} conversations of {name} into {len(rows):,} rows, "
        f"{len(positions) / (len(rows) * T):.1%} full; {cut:,} are longer than a row; "
        f"{left_out:,} exchanges are left out: too long, or no known answer"
    )
    return PackedDocuments(
        arrays["tokens"][positions],
        tokenizer.special_id(END_OF_TEXT),
        T,
        True,
        np.cumsum(lengths_P) - lengths_P,
        lengths_P,
        np.ones(len(pieces), bool),
        np.cumsum([0, *map(len, rows)]),
        None if config.data.learn_prompts else arrays["parts"][positions],
        np.array([n for n, *_ in placed]),
    )


def _stretches(offsets: list[int], T: int) -> Iterator[tuple[slice, list[int]]]:
    """Yields a conversation's system turn with bounds of consecutive exchanges."""
    user = (len(offsets) - 1) % 2  # index of the first user's turn

    def is_kept(i: int) -> bool:
        begin, answer, end = offsets[i : i + 3]
        fits = offsets[user] - offsets[0] + end - begin <= T
        return fits and end - answer > 2  # beside the role and the end of the turn

    for kept, group in groupby(range(user, len(offsets) - 1, 2), is_kept):
        if kept:
            turns = [*group]
            starts = offsets[turns[0] : turns[-1] + 3 : 2]
            yield slice(offsets[0], offsets[user]), starts
