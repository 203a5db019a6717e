"""The texts that a command works on: its arguments, lines of stdin, or typed lines."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from queue import Queue

from jaxgpt.exits import in_background, until_interrupt
from jaxgpt.start import cache_dir
from jaxgpt.terminal import log_line

_LINES = 1000  # read ahead, at most


def given_texts(arguments: Sequence[str], most: int) -> Iterator[list[str]]:
    """Yields the arguments or, if there is none, the lines of stdin, in order.

    Lines come without waiting for others: those that have been read so far, and at
    most so many at once. An empty line is a text too. Raises ValueError if stdin or
    stdout is closed, or a line is not UTF-8.
    """
    if arguments:
        for start in range(0, len(arguments), most):
            yield [*arguments[start : start + most]]
        return
    for name, redirected in (("stdin", "< FILE"), ("stdout", "> FILE")):
        if getattr(sys, name) is None:
            raise ValueError(f"{name} is closed; redirect it, as in `{redirected}`")
    if sys.stdin.isatty():
        log_line("type a text, then Enter; Ctrl-D ends")
    lines: Queue[bytes | None] = Queue(_LINES)

    def read() -> None:
        try:
            for line in sys.stdin.buffer:
                lines.put(line)
        finally:
            lines.put(None)

    reading, texts = in_background(read), list[str]()
    for number, line in enumerate(iter(lines.get, None), 1):
        texts.append(_decode(line, number))
        if len(texts) == most or lines.empty():
            yield texts
            texts = []
    if texts:
        yield texts
    reading.result()  # raises if stdin can't be read


def typed_lines() -> Iterator[list[str]]:
    """Yields each line that is typed at a prompt; an interrupted one is empty."""
    _line_history("read_history_file")
    prompt = "> " if sys.stdout.isatty() else ""
    with suppress(EOFError):
        while True:
            line = until_interrupt(partial(input, prompt)) or ""
            _line_history("write_history_file")
            yield [line]
    print()


def _line_history(method: str) -> None:
    """Reads or writes the file of typed lines, if possible; enables line editing."""
    with suppress(ImportError, OSError):
        readline = import_module("readline")  # Windows has none
        readline.set_history_length(1000)
        getattr(readline, method)(cache_dir() / "chat_history")


def _decode(line: bytes, number: int) -> str:
    encoding = "utf-8-sig" if number == 1 else "utf-8"  # without a byte order mark
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {number} of stdin is not UTF-8 text ({error.reason}); convert it, "
            "as with iconv -t UTF-8"
        ) from error
