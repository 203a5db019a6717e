"""Prompts, and preferences between two responses to a prompt: files and their tokens.

A line of JSONL is {"prompt": TEXT} or {"messages": [...]}, of which the last message is
the user's; preferences also have "chosen" and "rejected", which are texts. All of these
are always text, even where they spell a special token. A response to messages ends with
the token that ends a turn; one to a text has no end.

N examples
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.config import Config, DataConfig
from jaxgpt.text.conversations import (
    END_OF_TURN,
    Message,
    check_messages,
    encode_turns,
    is_chat_tokenizer,
)
from jaxgpt.text.examples import Examples, Preferences, Prompts, Sequences
from jaxgpt.text.tables import (
    SPLITS,
    Log,
    Row,
    Table,
    check_files,
    digest_files,
    encode_known,
    read_objects,
    splits_of,
)
from jaxgpt.text.tokenizer import Tokenizer, token_dtype, without_surrogates

_FRACTION = 0.1  # of the prompts, for each of val and test
_RESPONSES = ("chosen", "rejected")


def open_preferences(data: DataConfig, has_responses: bool) -> Table:
    """Finds prompts, without reading them; the hash of a prompt determines its split.

    A row is the prompt as JSON, a string or a list of messages; then the chosen and the
    rejected response, if there are any.

    Args:
      has_responses: whether the rows must have responses; else they are ignored.

    Raises OSError or ValueError if the files can't be used.
    """
    paths = check_files(data.path, (".jsonl", ".ndjson"))
    names = _RESPONSES if has_responses else ()

    def read() -> tuple[list[Row], np.ndarray]:
        rows = []
        for path in paths:
            for place, values in read_objects(path):
                try:
                    rows.append(_read_row(values, names))
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
        if not rows:
            raise ValueError(f"{', '.join(data.path)}: there is no prompt")
        return rows, splits_of([row[0] for row in rows], _FRACTION)

    return Table(digest_files(paths), read)


def _read_row(values: dict[str, Any], names: Sequence[str]) -> Row:
    """Reads a line; raises ValueError if it lacks a prompt or a response."""
    if ("prompt" in values) == ("messages" in values):
        fields = ['"prompt": "..."', *(f'"{name}": "..."' for name in names)]
        raise ValueError(
            f'a line must be like {{{", ".join(fields)}}}, or have "messages" in place '
            'of "prompt"'
        )
    is_text = "prompt" in values
    for name in ("prompt", *names) if is_text else names:
        if not isinstance(text := values.get(name), str):
            raise ValueError(f'"{name}" must be text, not {type(text).__name__}')
    texts = [without_surrogates(values[name]) for name in names]
    if "" in (stripped := [text.strip() for text in texts]):
        raise ValueError(f'"{names[stripped.index("")]}" is empty; remove the line')
    if texts and texts[0] == texts[1]:
        raise ValueError("chosen and rejected are the same; remove the line")
    if is_text:
        return json.dumps(without_surrogates(values["prompt"])), *texts
    return json.dumps(check_messages(values["messages"], last="user")), *texts


def texts_of(row: Row) -> list[str]:
    """The texts of a row of `open_preferences`."""
    prompt: Any = json.loads(row[0])
    begins = [prompt] if isinstance(prompt, str) else [text for _, text in prompt]
    return [*begins, *row[1:]]


def tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, config: Config, log: Log
) -> Any:
    """Tokenizes rows of `open_preferences`; returns what `make_examples` takes.

    These are the token ids of all prompts, chosen and rejected responses in turn, and
    where each begins.
    """
    first, *responses = zip(*rows, strict=True)
    prompts = [json.loads(prompt) for prompt in first]
    is_chat = [isinstance(prompt, list) for prompt in prompts]
    if any(is_chat) and not is_chat_tokenizer(tokenizer):
        raise ValueError(
            "the prompts are conversations, but the model's tokenizer does not have "
            "their special tokens; start from a run that was trained on conversations"
        )
    columns = [encode_prompts(tokenizer, config, prompts, log)]
    for texts in responses:
        ends = [[tokenizer.special_id(END_OF_TURN)] if chat else [] for chat in is_chat]
        found = encode_known(texts, tokenizer, log)
        columns.append([*map(np.append, found, ends)])
    joined = Sequences.join(each for row in zip(*columns, strict=True) for each in row)
    tokens = joined.tokens.astype(token_dtype(tokenizer.vocab_size))
    return {"tokens": tokens, "offsets": joined.offsets}


def encode_prompts(
    tokenizer: Tokenizer, config: Config, prompts: Sequence[Any], log: Log | None = None
) -> list[np.ndarray]:
    """Token ids of prompts, each text or a list of messages, at least one.

    Unless packing=windows, the end-of-text token comes first, as in training.
    """
    end, found = tokenizer.end_of_text, list[np.ndarray]()
    begin = [] if config.data.packing == "windows" or end is None else [end]
    texts = [p if isinstance(p, str) else "" for p in prompts]
    for prompt, ids in zip(prompts, encode_known(texts, tokenizer, log), strict=True):
        if isinstance(prompt, list):
            turns = encode_turns([Message(*each) for each in prompt], tokenizer, log)
            answer = tokenizer.special_id("<|assistant|>")
            found.append(np.concatenate([[end], *turns, [answer]]))
        else:
            start = () if begin or len(ids) else tokenizer.encode(tokenizer.start)
            found.append(np.concatenate([begin, start, ids]).astype(np.int32))
    return found


def make_examples(
    arrays: dict[str, Any], config: Config, log: Log, split: str
) -> Examples:
    """Makes the `Prompts` or `Preferences` of "train", "val", "test" or "all".

    Of longer prompts, the last tokens are kept that leave room in block_size for the
    response; pairs whose response alone has no room are left out. Logs both counts.

    Args:
      arrays: of `tokenize`, with the index of each prompt's split.

    Raises ValueError if there are none.
    """
    T, split_N = config.model.block_size, arrays["split"]
    keep_N = split_N == SPLITS.index(split) if split in SPLITS else split_N >= 0
    texts = Sequences(arrays["tokens"], arrays["offsets"])
    columns, rows = len(texts) // len(split_N), np.flatnonzero(keep_N)
    lengths_NK = texts.lengths.reshape(-1, columns)
    room_N = T - lengths_NK[:, 1:].max(axis=1, initial=0)
    if config.rewarded:
        room_N = np.full(len(split_N), T - config.rewarded.max_new_tokens)
        if room_N[0] < 1:
            raise ValueError(
                f"max_new_tokens={config.rewarded.max_new_tokens} leaves no room for a "
                f"prompt in block_size={T}; lower it"
            )
    fitting = rows[room_N[rows] > 0]
    if not len(fitting):
        lack = f"no response that fits block_size={T}" if len(rows) else "no prompts"
        raise ValueError(
            f"the {split} split has {lack}; give more, since each prompt's hash "
            "determines its split"
        )
    cut = np.count_nonzero(lengths_NK[fitting, 0] > room_N[fitting])
    if left_out := len(rows) - len(fitting):
        log(f"{split}: {left_out:,} pairs are left out: a response is too long")
    if cut:
        log(
            f"{split}: {cut:,} of {len(fitting):,} prompts are cut to their last tokens"
        )
    prompts = [texts[row * columns][-room_N[row] :] for row in fitting.tolist()]
    if config.rewarded:
        return Prompts(Sequences.join(prompts))
    pairs = [
        np.concatenate([prompt, texts[row * columns + column]])
        for row, prompt in zip(fitting.tolist(), prompts, strict=True)
        for column in (1, 2)
    ]
    return Preferences(Sequences.join(pairs), np.array([*map(len, prompts)]))
