"""How a script ends: what a signal does, exit statuses, one line on an error."""

import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax

_HANGUP = getattr(signal, "SIGHUP", 0)  # Windows has none
_SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number]
_REPEAT_SECONDS = 0.5  # seconds; GNU timeout and other wrappers send each signal twice
_EXPECTED = (ArithmeticError, ImportError, MemoryError, OSError, ValueError)
_DISK_FULL = "no room is left; make some, and go on: what was saved before is kept. "
_NO_PERMISSION = "the permissions forbid it; change them, or name another place. "
_IN_THE_WAY = "a file is where a folder should be, or the reverse; move it away. "
_HINTS = {
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _IN_THE_WAY),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _DISK_FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_PERMISSION),
}


class _Interrupts:
    """Handles signals in the main thread: the first one raises KeyboardInterrupt."""

    first = 0  # number of the first signal, 0 if there was none
    deferred = False  # whether it is only noted
    raised = False  # whether it is not, and any error may be what became of it

    def __call__(self, number: int, frame: object) -> None:
        if not self.first:
            self.first, self.raised = number, not self.deferred
            if self.raised:
                raise KeyboardInterrupt


_interrupts = _Interrupts()


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Has a first signal noted only; yields a function that gives its number, or 0.

    A loop that asks between steps can save before it ends.
    """
    _interrupts.deferred = True
    try:
        yield lambda: _interrupts.first
    finally:
        _interrupts.deferred = False


def _watch(arrivals: socket.socket, terminals: list[int]) -> None:
    """Ends the script at a second signal, and lets go of a terminal that hangs up.

    `arrivals` has the number of each signal as soon as it comes. The main thread
    handles it only when it is back from XLA, which may take minutes.
    """
    first = 0.0
    while number := int.from_bytes(arrivals.recv(1)):
        if number == _HANGUP:  # from now on writes to the terminal fail
            for terminal in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        first = first or time.monotonic()
        if time.monotonic() - first > _REPEAT_SECONDS:
            with suppress(OSError):  # shows the cursor, which a progress bar hides
                os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"")
            os._exit(128 + number)
    arrivals.close()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the script with one line for what a user can mend, not with a traceback.

    JAXGPT_TRACEBACK=1 shows the traceback all the same. SIGINT (Ctrl-C), SIGTERM and
    SIGHUP exit with 128 and their number; a second one does so at once. What was
    ignored when the script started, as by `nohup`, stays ignored.
    """
    _interrupts.first, _interrupts.deferred, _interrupts.raised = 0, False, False
    arrivals, arriving = socket.socketpair()
    arriving.setblocking(False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before_fd = signal.set_wakeup_fd(arriving.fileno())
    terminals = [number for number in (1, 2) if os.isatty(number)]
    threading.Thread(target=_watch, args=(arrivals, terminals), daemon=True).start()
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupts)
    try:
        yield
        print(end="", flush=True)  # what stdout can't take is an error too
    except BrokenPipeError:  # its reader has gone, as in `generate.py | head`
        _exit(1)
    except (KeyboardInterrupt, RuntimeError, *_EXPECTED) as error:
        if _interrupts.raised or isinstance(error, KeyboardInterrupt):
            _exit(128 + (_interrupts.first or signal.SIGINT), "\ninterrupted\n")
        _exit_with_error(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        arriving.close()  # ends the thread


def _exit_with_error(error: Exception) -> NoReturn:
    """Ends the script with a line on the error; raises what is the code's own fault."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    lost = several and isinstance(error, (RuntimeError, TimeoutError))
    unexpected = isinstance(error, RuntimeError) and not (exhausted or lost)
    if os.environ.get("JAXGPT_TRACEBACK") or unexpected:
        if not several:
            raise error
        _exit(1, traceback.format_exc())
    hint = _HINTS.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    if exhausted or isinstance(error, MemoryError):
        hint = "there is too little memory; make the batch or the model smaller. "
    elif lost:
        hint = "another process of the run has ended; start all again with --resume. "
    _exit(1, f"error: {hint}{error}\n")


def _exit(status: int, words: str = "") -> NoReturn:
    """Ends the script at once, whatever its threads and other processes do.

    A thread that comes back from XLA while Python ends would abort it (status -6). As
    JAX ends the other processes when the first ends, that leaves them time for a word.
    """
    _interrupts.deferred = True
    for text, stream in (("", sys.stdout), (words, sys.stderr)):
        with suppress(OSError):  # no room, or nobody to read it
            print(text, end="", file=stream, flush=True)
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(2)
    os._exit(status)
