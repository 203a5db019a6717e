"""How a script ends: signals, exit statuses and one-line error messages."""

import _thread
import errno
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
_HANGUP = getattr(signal, "SIGHUP", 0)  # Windows has none
# Signals that would end the process. SLURM can send SIGUSR1 or SIGUSR2 before it stops
# a job, and SIGXCPU at its limit of CPU time.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_BACKGROUND = "background"  # name of threads that may outlive the script
_REPEAT_SECONDS = 0.5  # GNU timeout and other wrappers send each signal twice
_AGAIN_SECONDS = 0.05  # until a lost interrupt comes again
_EXPECTED = (ArithmeticError, ImportError, MemoryError, OSError, ValueError)
_DISK_FULL = "no disk space is left; free some and retry; earlier saves are kept. "
_NO_PERMISSION = "permission denied; change the permissions, or use another path. "
_IN_THE_WAY = "a file is where a folder should be, or the reverse; move it away. "
_HINTS = {
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), _IN_THE_WAY),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _DISK_FULL),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_PERMISSION),
}


def distributed() -> Any:
    """JAX if this process has joined a run of several, else None; never imports it."""
    jax = sys.modules.get("jax")
    joined = getattr(jax, "distributed", None)  # not yet if `import jax` is interrupted
    return jax if joined and joined.is_initialized() else None


class _Interrupt(KeyboardInterrupt):
    """Comes again if a library loses it, as JAX may while it traces."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number  # of the signal; 0 once it is handled

    def __del__(self) -> None:
        if self.number and (_interrupts.first or _interrupts.stops is not None):
            _interrupts.lost = self.number
            # Python would ignore it if it were raised here.
            timer = threading.Timer(_AGAIN_SECONDS, _interrupts.send_lost)
            timer.daemon = True
            timer.start()


class _Interrupts:
    """Handles signals in the main thread: the first one raises KeyboardInterrupt."""

    first = 0  # number of the first signal, 0 if there was none
    deferred = False  # whether to only record the first signal
    raised = False  # whether it raised; a later error may be the consequence
    stops: bool | None = None  # whether SIGINT stops `until_interrupt`; None before it
    lost = 0  # number of the signal whose exception was lost
    resent = 0  # lost signals that `_watch` has yet to receive

    def __call__(self, number: int, frame: object) -> None:
        raises = bool(self.lost) and not self.deferred
        self.lost = 0
        if self.stops is not None and number == signal.SIGINT:
            raises |= self.stops
            self.stops = False  # only the first SIGINT raises
        elif not self.first:
            self.first, self.raised = number, not self.deferred
            raises |= self.raised
        if raises:
            raise _Interrupt(number)  # a local variable would keep it alive

    def send_lost(self) -> None:
        """Has the main thread handle the lost signal again, unless the script ended."""
        if self.lost:
            self.resent += 1
            _thread.interrupt_main(signal.Signals(self.lost))


_interrupts = _Interrupts()


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], int]]:
    """Only records the first signal; yields a function that returns its number, or 0.

    A loop that checks it between steps can save a checkpoint before it ends.
    """
    _interrupts.deferred = True
    try:
        yield lambda: _interrupts.first
    finally:
        _interrupts.deferred = False


def until_interrupt(function: Callable[[], T]) -> T | None:
    """Calls a function; returns None if SIGINT (Ctrl-C) stops it.

    After the first such call the script ignores SIGINT between these calls. The other
    signals still end it.
    """
    try:
        _interrupts.stops = True
        return function()
    except KeyboardInterrupt as interrupt:
        if _interrupts.first:  # another signal
            raise
        if isinstance(interrupt, _Interrupt):
            interrupt.number = 0
        return None
    finally:
        _interrupts.stops, _interrupts.lost = False, 0


def in_background(function: Callable[[], T]) -> Future[T]:
    """Calls a function in a thread; returns the future of its result.

    The thread does not keep the script from ending, by a signal or otherwise.
    """
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True, name=_BACKGROUND).start()
    return result


def interruptible(function: Callable[[], T], seconds: float | None = None) -> T:
    """Calls a function in a thread, so that signals interrupt the wait for its result.

    The main thread handles no signal while it is inside a library's native code. Raises
    what the function raises, and TimeoutError after `seconds`; the thread then goes on.
    """
    return in_background(function).result(seconds)


def _compiles() -> bool:
    """Whether a thread of `in_background` runs, which would abort a normal exit."""
    return any(thread.name == _BACKGROUND for thread in threading.enumerate())


def _watch(receiver: socket.socket, terminals: list[int]) -> None:
    """Ends the script at a second signal, and detaches it from a closed terminal.

    `receiver` gets the number of each signal at once. The main thread can handle it
    only after it returns from XLA, which may take minutes.
    """
    first = 0.0
    while number := int.from_bytes(receiver.recv(1)):
        if _interrupts.resent:
            _interrupts.resent -= 1
            continue
        if number == signal.SIGINT and _interrupts.stops is not None:
            continue
        if number == _HANGUP:  # writes to the terminal now fail
            for terminal in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
        first = first or time.monotonic()
        if time.monotonic() - first > _REPEAT_SECONDS:
            with suppress(OSError):  # shows the cursor, which a progress bar hides
                os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"")
            os._exit(128 + number)
    receiver.close()


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the script with one line, not a traceback, for errors that a user can fix.

    JAXGPT_TRACEBACK=1 shows the traceback. SIGINT (Ctrl-C), SIGTERM, SIGHUP and SLURM's
    signals exit with 128 plus their number; a second one does so immediately. Signals
    that were ignored when the script started, as under `nohup`, stay ignored.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before_fd = signal.set_wakeup_fd(sender.fileno())
    terminals = [number for number in (1, 2) if os.isatty(number)]
    threading.Thread(target=_watch, args=(receiver, terminals), daemon=True).start()
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _interrupts)
    try:
        yield
        print(end="", flush=True)  # raises if stdout can't be written
        if _compiles():
            _exit(0)
    except BrokenPipeError:  # stdout was closed, as in `generate.py | head`
        _exit(1)
    except (KeyboardInterrupt, RuntimeError, *_EXPECTED) as error:
        if _interrupts.raised or isinstance(error, KeyboardInterrupt):
            _exit(128 + (_interrupts.first or signal.SIGINT), "\ninterrupted\n")
        _exit_with_error(error)
    except SystemExit as error:
        if _compiles():
            has_text = isinstance(error.code, str)
            _exit(*((1, f"{error.code}\n") if has_text else (int(error.code or 0),)))
        raise
    except Exception:
        if _compiles():
            _exit(1, traceback.format_exc())
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        sender.close()  # ends the thread
        vars(_interrupts).clear()  # the class has the values of the start


def _exit_with_error(error: Exception) -> NoReturn:
    """Ends the script with one line for the error; a bug gets a traceback."""
    jax = distributed()
    several = jax and jax.process_count() > 1
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    lost = several and isinstance(error, (RuntimeError, TimeoutError))
    unexpected = isinstance(error, RuntimeError) and not (exhausted or lost)
    if os.environ.get("JAXGPT_TRACEBACK") or unexpected:
        if not (several or _compiles()):
            raise error
        _exit(1, traceback.format_exc())
    hint = _HINTS.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    if exhausted or isinstance(error, MemoryError):
        hint = "out of memory; make the batch or the model smaller. "
    elif lost:
        hint = "another process of the run has ended; restart all with --resume. "
    _exit(1, f"error: {hint}{error}\n")


def _exit(status: int, message: str = "") -> NoReturn:
    """Prints `message` to stderr and exits without waiting for threads.

    A thread that returns from XLA while Python shuts down would abort it (status -6).
    When process 0 ends, JAX ends the others, so it first gives them time to report.
    """
    _interrupts.deferred = True
    for text, stream in (("", sys.stdout), (message, sys.stderr)):
        with suppress(OSError):  # the disk is full, or the reader has gone
            print(text, end="", file=stream, flush=True)
    jax = distributed()
    if jax and jax.process_index() == 0:
        time.sleep(2)
    os._exit(status)
