"""A conversation on the terminal: python -m jaxgpt chat --run-dir DIR."""

import itertools
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from jaxgpt.commands.texts import given_texts
from jaxgpt.config import SamplingConfig, sampling_contradictions
from jaxgpt.exits import interruptible, repeated_interrupts
from jaxgpt.generation.chat import answer, chat_tokenizer
from jaxgpt.generation.decode import check_sampling
from jaxgpt.run import load_run
from jaxgpt.start import cache_dir
from jaxgpt.terminal import log_line
from jaxgpt.text.conversations import Message
from jaxgpt.text.tables import encode_known
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
    tokenizer, vocab_size = chat_tokenizer(run), run.model.config.vocab_size
    check_sampling(vocab_size, max_new_tokens, sampling, seed)
    messages, notices = list[Message](), list[str]()
    seeds = itertools.count(seed)
    # `input` needs all three, which are None if they are closed
    terminal = bool(sys.stdin and sys.stdout and sys.stderr) and sys.stdin.isatty()

    def draw() -> None:
        """Draws the last message, which is empty so far, and prints it."""
        settings = max_new_tokens, sampling, next(seeds) % 2**32, notices.append
        texts = answer(run, messages[:-1], *settings)
        for text in iter(partial(interruptible, partial(next, texts, None)), None):
            messages[-1] = Message("assistant", messages[-1].content + text)
            if terminal:
                print(text, end="", flush=True)
        if not terminal:
            print(" ".join(messages[-1].content.splitlines()), end="")

    if system:
        messages.append(_message("system", system, tokenizer))
    if terminal:
        log_line("type a message, then Enter; /help lists commands; Ctrl-D ends")
        _line_history("read_history_file")
    lines, prompt = given_texts([], 1), "> " if terminal and sys.stdout.isatty() else ""
    with repeated_interrupts() as ending_signal:
        try:
            while True:
                try:
                    line = input(prompt) if terminal else next(lines)[0]
                    _respond(line, messages, tokenizer, draw)
                except StopIteration:
                    return 0
                except KeyboardInterrupt:
                    if not terminal or ending_signal():
                        raise
                except (MemoryError, RuntimeError, ValueError) as error:
                    if not terminal:
                        raise
                    log_line(f"\nerror: {error}")
                print(flush=True)
                while notices:
                    log_line(notices.pop(0))
        except EOFError:
            print()
            return 0
        finally:
            if terminal:
                _line_history("write_history_file")


def _respond(
    line: str, messages: list[Message], tokenizer: Tokenizer, draw: Callable[[], None]
) -> None:
    """Carries out a command, or sends a message of the user and draws the answer.

    Each message of the user is followed by an answer, which at first is empty.
    """
    name, _, text = line.partition(" ")
    match name:
        case _ if not line.strip():
            log_line("an empty line is not sent")
        case "/reset":
            messages[:] = [each for each in messages if each.role == "system"]
            log_line("a new conversation")
        case "/system":
            messages.clear()
            if text.strip():
                messages.append(_message("system", text, tokenizer))
            log_line(f"a new conversation with system message {text.strip()!r}")
        case "/retry" if messages and messages[-1].role == "assistant":
            messages[-1] = Message("assistant", "")
            draw()
        case "/retry":
            log_line("there is no answer to draw again")
        case "/save":
            _save(text.strip(), messages)
        case _ if name.startswith("/"):
            unknown = f"there is no command {name}; /help lists them"
            log_line(_HELP if name == "/help" else unknown)
        case _:
            messages += _message("user", line, tokenizer), Message("assistant", "")
            draw()


def _message(role: str, text: str, tokenizer: Tokenizer) -> Message:
    """The message; logs which characters the tokenizer does not have."""
    text = without_surrogates(text.strip())
    encode_known([text], tokenizer, log_line)
    return Message(role, text)


def _save(path: str, messages: list[Message]) -> None:
    """Appends a line for `read_conversations`; leaves out empty answers' exchanges."""
    odd = len(messages) % 2  # if there is a system message
    kept, turns = messages[:odd], iter(messages[odd:])
    for asked, answered in zip(turns, turns, strict=True):
        kept += [asked, answered] if answered.content.strip() else []
    if len(kept) < len(messages):
        log_line(f"left out {(len(messages) - len(kept)) // 2} empty answers")
    if not path or len(kept) < 2:
        return log_line("/save needs a FILE, and an answer to save")
    saved = json.dumps({"messages": [*map(Message._asdict, kept)]}, ensure_ascii=False)
    try:
        with Path(path).expanduser().open("a+b") as file:
            file.seek(max(0, file.tell() - 1))
            before = b"" if file.read() in (b"", b"\n") else b"\n"
            file.write(before + saved.encode() + b"\n")
        log_line(f"saved in {path}")
    except (OSError, RuntimeError, ValueError) as error:
        log_line(f"not saved: {error}")


def _line_history(method: str) -> None:
    """Reads or writes the file of typed lines, if possible; enables line editing."""
    with suppress(ImportError, OSError):
        readline = import_module("readline")  # Windows has none
        readline.set_history_length(1000)
        getattr(readline, method)(cache_dir() / "chat_history")
