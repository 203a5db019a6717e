"""The texts that a command works on: its arguments, or the lines of stdin."""

import sys
from collections.abc import Iterator, Sequence
from queue import Queue

from jaxgpt.exits import in_background
from jaxgpt.terminal import log_line

_LINES = 1000  # read ahead, at most


def given_texts(arguments: Sequence[str], most: int) -> Iterator[list[str]]:
    """Yields the arguments or, if there is none, the lines of stdin, in order.

    Lines come without waiting for others: those that have been read so far, and at
    most so many at once. An empty line is a text too. Raises ValueError if stdin is
    closed, or a line is not UTF-8.
    """
    if arguments:
        for start in range(0, len(arguments), most):
            yield [*arguments[start : start + most]]
        return
    if sys.stdin is None:
        raise ValueError("stdin is closed; redirect it, as in `< FILE`")
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


def _decode(line: bytes, number: int) -> str:
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {number} of stdin is not UTF-8 text ({error.reason}); convert it, "
            "as with iconv -t UTF-8"
        ) from error
