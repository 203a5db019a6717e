"""A conversation on the terminal: python -m jaxgpt chat --run-dir DIR."""

import json
import sys
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jaxgpt.commands.texts import given_texts, typed_lines
from jaxgpt.config import SamplingConfig, sampling_contradictions
from jaxgpt.exits import interruptible, until_interrupt
from jaxgpt.generation.chat import answer, chat_tokenizer
from jaxgpt.generation.decode import check_sampling
from jaxgpt.run import load_run
from jaxgpt.terminal import log_line
from jaxgpt.text.conversations import Message
from jaxgpt.text.tables import Log, encode_known
from jaxgpt.text.tokenizer import Tokenizer, without_surrogates

_HELP = """\
/reset        start a new conversation; the system message stays
/system TEXT  set the system message, or none without TEXT; start a new conversation
/retry        draw the last answer again
/save FILE    append the conversation to a file, as --data.path of chat-sft reads it
Ctrl-C stops an answer; Ctrl-D ends. A line that begins with a space is no command."""
_DEFAULT_SAMPLING = SamplingConfig()


def chat(
    *,
    run_dir: Path,
    checkpoint: str = "best",
    system: str = "",
    max_new_tokens: int = 500,
    sampling: Annotated[SamplingConfig, arg(name="")] = _DEFAULT_SAMPLING,
    seed: int = 1337,
) -> int:
    """Answers each line that is typed; /help lists commands, such as /reset.

    If stdin is not a terminal, each of its lines gets one line, an empty one for a
    command or an empty line.

    Args:
        run_dir: run directory written by train.py, of a model trained on conversations
        checkpoint: best (lowest val loss), latest, or a step
        system: text of the system message, which comes before the conversation
        max_new_tokens: an answer ends after so many tokens
        seed: random seed; the same seed gives the same answers: the n-th, from 0, is
            drawn with seed + n
    """
    if system and not system.strip():
        raise ValueError(f"--system {system!r} is empty; give a text, or omit it")
    for line in sampling_contradictions(sampling, 1):
        log_line(line)
    run = load_run(run_dir, checkpoint)
    tokenizer = chat_tokenizer(run)
    check_sampling(run.model.config.vocab_size, max_new_tokens, sampling, seed)
    messages = _message("system", system, tokenizer)
    seeds = ((seed + n) % 2**32 for n in count())
    tell_once = cache(log_line)
    # `input` needs all three, which are None if they are closed
    terminal = bool(sys.stdin and sys.stdout and sys.stderr) and sys.stdin.isatty()

    def draw(asked: list[Message], texts: list[str], log: Log) -> None:
        """Appends an answer to `texts` while it is drawn; a terminal shows it too."""
        new = answer(run, asked, max_new_tokens, sampling, next(seeds), log)
        for text in iter(partial(interruptible, partial(next, new, None)), None):
            texts.append(text)
            if terminal:
                print(text, end="", flush=True)

    if terminal:
        log_line("type a message, then Enter; /help lists commands; Ctrl-D ends")
    lines = typed_lines() if terminal else given_texts([], 1)
    for (line,) in lines:
        texts, notices = list[str](), list[str]()
        asked = _asked(line, messages, tokenizer)
        try:
            if asked:
                start = partial(draw, asked, texts, notices.append)
                if terminal:
                    until_interrupt(start)
                else:
                    start()
        except (MemoryError, RuntimeError, ValueError) as error:
            if not terminal:
                raise
            log_line(f"\nerror: {error}")
        text = "".join(texts)
        print("" if terminal else " ".join(text.splitlines()), flush=True)
        for notice in notices:
            tell_once(notice)
        if text.strip():
            messages[:] = [*asked, Message("assistant", text)]
        elif asked:
            log_line("the answer is empty; the conversation stays as it was")
        if len(messages) < 2:  # a new conversation
            tell_once.cache_clear()
    return 0


def _asked(line: str, messages: list[Message], tokenizer: Tokenizer) -> list[Message]:
    """Carries out a command; returns the messages to answer, for most commands none.

    `messages` are the system's, if any, then the user's, each with its answer.
    """
    name, _, text = line.partition(" ")
    text = text.strip()
    match name:
        case "/reset" | "/retry" | "/help" if text:
            log_line(f"{name} takes no text")
        case "/help":
            log_line(_HELP)
        case "/reset":
            del messages[len(messages) % 2 :]  # keeps the system's
            log_line("a new conversation")
        case "/system":
            messages[:] = _message("system", text, tokenizer)
            log_line(
                f"a new conversation with{'' if messages else 'out'} a system message"
            )
        case "/save" if not text:
            log_line("/save needs a FILE")
        case "/retry" | "/save" if len(messages) < 2:
            log_line(f"there is no answer to {name[1:]}")
        case "/retry":
            return messages[:-1]
        case "/save":
            _save(text, messages)
        case _ if name.startswith("/"):
            log_line(f"there is no command {name}; /help lists them")
        case _ if message := _message("user", line, tokenizer):
            return [*messages, *message]
    return []


def _message(role: str, text: str, tokenizer: Tokenizer) -> list[Message]:
    """A list of the message, or of none if it has no text that the tokenizer knows."""
    text = without_surrogates(text.strip())
    known = tokenizer.decode(encode_known([text], tokenizer, log_line)[0]).strip()
    if text and not known:
        log_line("nothing is left of the message, so it is left out")
    return [Message(role, text)] if known else []


def _save(path: str, messages: list[Message]) -> None:
    """Appends the conversation to a file, as a line for `read_conversations`."""
    saved = {"messages": [*map(Message._asdict, messages)]}
    try:
        with Path(path).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(saved, ensure_ascii=False) + "\n")
        log_line(f"saved in {path}")
    except (OSError, RuntimeError, ValueError) as error:
        log_line(f"not saved: {error}")
