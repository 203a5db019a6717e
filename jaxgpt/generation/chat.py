"""Answers in a conversation, all at once or streamed."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgpt.config import SamplingConfig
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.generation.stream import decode_stream
from jaxgpt.run import Run, check_call, require_task, text_tokenizer
from jaxgpt.text.conversations import (
    CHAT_TOKENS,
    Message,
    check_messages,
    encode_turns,
    is_chat_tokenizer,
)
from jaxgpt.text.tables import Log
from jaxgpt.text.tokenizer import END_OF_TEXT, Tokenizer


def chat(
    run: Run,
    messages: Sequence[dict[str, str]],
    *,
    max_new_tokens: int = 500,
    temperature: float = SamplingConfig.temperature,
    top_k: int | None = SamplingConfig.top_k,
    top_p: float | None = SamplingConfig.top_p,
    seed: int = 1337,
) -> str:
    """Returns the answer to the last of the messages.

    Args:
      run: the result of `load_run`, of a model trained on conversations.
      messages: a list like [{"role": "user", "content": "Hello"}], the last one the
        user's; see `chat_prompt`. Characters that the tokenizer lacks are left out.
      max_new_tokens: the answer ends after so many tokens.
      temperature, top_k, top_p, seed: as in `generate`.

    Raises ValueError that names the message or the argument that does not fit, or if
    the run's tokenizer has no special tokens of conversations.
    """
    check_call(run, max_new_tokens=max_new_tokens, seed=seed)
    sampling = SamplingConfig(temperature, top_k, top_p)
    asked = check_messages(messages, last="user")
    return "".join(answer(run, asked, max_new_tokens, sampling, seed))


def answer(
    run: Run,
    messages: Sequence[Message],
    max_new_tokens: int,
    sampling: SamplingConfig,
    seed: int,
    log: Log | None = None,
) -> Iterator[str]:
    """Returns an iterator over the answer to the last message, a few tokens at a time.

    It ends before the first special token. Beyond block_size the model sees the last
    block_size tokens, as in `generate_tokens`.

    Args:
      messages: as in `chat_prompt`.
      log: told when messages, or the beginning of the text, are outside the window.

    Raises ValueError as `chat` does.
    """
    tokenizer, model = chat_tokenizer(run), run.model
    ids, unseen = chat_prompt(messages, tokenizer, model.config.block_size)
    if log and unseen:
        log("the oldest messages are outside the window")
    ends = tuple(map(tokenizer.special_id, CHAT_TOKENS))
    drawn_tokens = generate_tokens(
        model, run.params, [ids], max_new_tokens, sampling, seed, ends
    )
    seen = _watch(drawn_tokens, len(ids), model.config.block_size, log)
    return (text for (text,) in decode_stream(tokenizer, seen, 1, ends))


def chat_tokenizer(run: Run) -> Tokenizer:
    """Returns the run's tokenizer; raises ValueError unless the run is for chatting."""
    require_task(run.config, "next-token")
    if not is_chat_tokenizer(tokenizer := text_tokenizer(run)):
        raise ValueError(
            f"the run's tokenizer lacks special tokens of conversations, such as "
            f"{CHAT_TOKENS[-1]}; train it: `python train.py chat-sft --init-from "
            "RUN_DIR`"
        )
    return tokenizer


def chat_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, block_size: int
) -> tuple[list[int], int]:
    """Token ids that the answer continues, and how many messages are left out of them.

    The oldest exchanges, a user's message and its answer, are left out while less than
    a quarter of block_size remains for the answer. A system message and the last one
    always stay, even where they are longer than block_size.

    Args:
      messages: at most one of the system, then those of user and assistant in turn; the
        last one is the user's.
    """
    turns = [ids.tolist() for ids in encode_turns(messages, tokenizer)]
    begin = [tokenizer.special_id(END_OF_TEXT)]
    if messages[0].role == "system":
        begin += turns.pop(0)
    answer_id, unseen = tokenizer.special_id("<|assistant|>"), 0
    room = block_size - len(begin) - sum(map(len, turns)) - 1
    while 4 * room < block_size and unseen < len(turns) - 1:
        room += len(turns[unseen]) + len(turns[unseen + 1])
        unseen += 2
    return [*begin, *(id_ for ids in turns[unseen:] for id_ in ids), answer_id], unseen


def _watch(
    drawn_tokens: Iterable[Any], length: int, block_size: int, log: Log | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Passes tokens on; logs once when the text before them exceeds block_size."""
    for tokens, log_probs in drawn_tokens:
        if log and length > block_size:
            log(
                f"the model sees the last {block_size} tokens only; the others are "
                "outside the window"
            )
            log = None
        length += tokens.shape[1]
        yield tokens, log_probs
