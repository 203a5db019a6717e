"""What the scripts print besides their output: log lines and progress bars."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.files import is_first_process

_LINE_SECONDS = 30  # between lines of progress where there is no terminal


def log_line(line: str) -> None:
    """Prints a line to stderr; stdout is for a command's output.

    Only the first process prints. A line that cannot be written, for example to a
    closed terminal, is dropped.
    """
    if is_first_process():
        line = line.encode(errors="replace").decode()  # of paths that are not UTF-8
        with suppress(OSError):
            print(f"{line}\n", end="", file=sys.stderr, flush=True)  # as one write


def counter(
    label: str,
    total: int,
    show: Callable[[int], object] | None,
    note: Callable[[], str] = str,
) -> Callable[[int], None]:
    """Makes a function that adds to how much of long work is done, and shows it.

    Args:
      label: what is being done.
      total: how much there is to do, in any unit.
      show: called with what is done, for a terminal. Without it, a line says the share
        every half minute.
      note: returns more to say in that line.
    """
    done, started = 0, time.monotonic()
    said = started

    def advance(amount: int) -> None:
        nonlocal done, said
        done += amount
        if show:
            show(done)
        elif done and time.monotonic() - said > _LINE_SECONDS:
            said = time.monotonic()
            left = (said - started) * (total - done) / done
            log_line(f"{label}: {done / total:.0%}, {note()}{left:.0f} s left")

    return advance


@contextmanager
def progress(
    label: str, total: int, note: Callable[[], str] = str
) -> Iterator[Callable[[int], None]]:
    """Shows how much of long work is done; yields a function that adds to it.

    On a terminal it is a bar with the time left on stderr; elsewhere, a line every half
    minute.

    Args:
      label: what is being done.
      total: how much there is to do, in any unit.
      note: returns more to say, such as "3 documents, ".
    """
    console = Console(stderr=True, highlight=False)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and is_first_process()),
    ) as bar:
        task = bar.add_task(label, total=total)

        def show(done: int) -> None:
            said = f"{label}: {note()}".rstrip(" ,:")
            bar.update(task, completed=done, description=said)

        yield counter(label, total, None if bar.disable else show, note)
