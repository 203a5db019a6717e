"""How a script ends: what a signal does, exit statuses, one line on an error."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import jax

_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    if hasattr(signal, name)
]
_ONCE = 0.5  # seconds within which a signal that comes again is the same
_EXPECTED = (
    ValueError,
    ArithmeticError,
    ImportError,
    OSError,
    MemoryError,
    RuntimeError,
)
_NO_ROOM = "no room is left; make some, and go on: what was saved before is kept. "
_NO_LEAVE = "the permissions forbid it; change them, or name another place. "
_IN_THE_WAY = "a file is where a folder should be, or the reverse; move it away. "
_HINTS = {
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _IN_THE_WAY),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_LEAVE),
}


class _Interrupts:
    """What signals have asked of this script.

    Attributes:
      asked: number of the signal that asked it to end, or 0.
      deferred: whether to note it only, for a loop that ends when it can.
    """

    asked = 0
    deferred = False
    _since = 0.0

    def __call__(self, number: int, frame: object) -> None:
        """The first signal raises KeyboardInterrupt or is noted; a second one ends."""
        if not self.asked:
            self.asked, self._since = number, time.monotonic()
            if not self.deferred:
                raise KeyboardInterrupt
        elif time.monotonic() - self._since > _ONCE:  # `timeout` sends each twice
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
            os._exit(128 + number)


_interrupts = _Interrupts()


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Has a first signal wait; yields what tells its number, or 0.

    A loop that asks between steps can save before it ends.
    """
    _interrupts.deferred = True
    try:
        yield lambda: _interrupts.asked
    finally:
        _interrupts.deferred = False


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the script with one line for what a user can mend, not with a traceback.

    JAXGPT_TRACEBACK=1 shows the traceback all the same. SIGINT (Ctrl-C), SIGTERM and
    SIGHUP exit with 128 and their number; a second one does so at once. What the
    script was started to ignore, as by `nohup`, it ignores.
    """
    _interrupts.asked, _interrupts.deferred = 0, False
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupts)
    try:
        yield
    except KeyboardInterrupt:
        _leave_interrupted()
    except BrokenPipeError:  # its reader has gone, as in `generate.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    except _EXPECTED as error:
        if _interrupts.asked:  # which has become another error on its way
            _leave_interrupted()
        _leave_with(error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_interrupted() -> NoReturn:
    with suppress(OSError):  # the terminal may be gone
        print("\ninterrupted", file=sys.stderr)
    _leave(128 + (_interrupts.asked or signal.SIGINT))


def _leave_with(error: Exception) -> NoReturn:
    """Ends the script with a line on the error; raises what is the code's own fault."""
    several = jax.distributed.is_initialized() and jax.process_count() > 1
    out_of_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )
    lost = several and isinstance(error, (RuntimeError, TimeoutError))
    unexpected = isinstance(error, RuntimeError) and not (out_of_memory or lost)
    if os.environ.get("JAXGPT_TRACEBACK") or unexpected:
        if not several:
            raise error
        traceback.print_exc()
        _leave(1)
    hint = ""
    if isinstance(error, OSError):
        hint = _HINTS.get(error.errno or 0, "")
    if out_of_memory:
        hint = "there is too little memory; make the batch or the model smaller. "
    elif lost:
        hint = (
            "another process of the run has ended, or can't be reached; when all "
            "have ended, start them again with --resume. "
        )
    print(f"error: {hint}{error}", file=sys.stderr)
    _leave(1)


def _leave(status: int) -> NoReturn:
    """Ends the script at once, whatever its threads and other processes do.

    A thread that comes back from XLA while Python ends would abort it (status -6). As
    JAX ends the other processes when the first ends, that leaves them time for a word.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # no room for it
            stream.flush()
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(2)
    os._exit(status)
