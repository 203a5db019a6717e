"""What must be settled before JAX starts, and how a script ends.

The scripts call `start` first; `import jaxgpt` never does.
"""

import ctypes
import errno
import gc
import logging
import mmap
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import jax
import jaxlib

from jaxgpt.processes import highest, is_first_process, several_processes

_YNN_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_XLA_FLAGS = {
    # Products and sums by YNNPACK, on x86-64: on 2 cores a step of
    # `shakespeare-char-cpu` took 21.5 ms with the products, 29.0 without.
    _YNN_FLAG: ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE"),
    # Products by cuBLAS alone: XLA would compile and time many of Triton's for each. On
    # an H100 `shakespeare-char` then takes 39 s to compile, not 60, and a step is as
    # fast.
    "xla_gpu_enable_triton_gemm": ("false",),
}
_M_ARENA_MAX = -8  # glibc's malloc.h
ASIDE = ".tmp"  # suffix of what is being written
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


def cache_dir() -> Path:
    """Folder for corpora and compiled programs: $JAXGPT_CACHE or ~/.cache/jaxgpt."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JAXGPT_CACHE") or Path(base) / "jaxgpt")


def start() -> None:
    """Sets what makes JAX fast here, and a persistent compilation cache.

    What the user has set wins: JAX_NUM_CPU_DEVICES, XLA_FLAGS, MALLOC_ARENA_MAX,
    JAX_COMPILATION_CACHE_DIR.
    """
    # Orbax warns of what is meant, and logs with a traceback what we tell in a line.
    # So does asyncio, when more than one of a save's arrays could not be written.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _tell_unraisable
    flags = os.environ.get("XLA_FLAGS", "")
    if not (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in flags
    ):
        # XLA runs elementwise code on one thread per CPU device: on 2 cores a step of
        # `shakespeare-char-cpu` takes two devices 17.2 ms, one 18.2. At most 8, since
        # each holds a copy of the parameters.
        jax.config.update("jax_num_cpu_devices", min(8, _cpu_cores()))
    for name, values in _XLA_FLAGS.items():
        if name not in flags and _xla_knows(name, *values):
            flags = f"{flags} {_as_flag(name)}".strip()
    os.environ["XLA_FLAGS"] = flags
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "MALLOC_ARENA_MAX" not in os.environ and (glibc := _glibc()):
        # Else each of many threads has a heap to grow. With one for all, a step of
        # `shakespeare-char-cpu` took 19.6 ms, with two 18.1.
        glibc.mallopt(_M_ARENA_MAX, 2)
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # so JAX says that there is no TPU here
        # Where libtpu is installed for --plan, it would complain of it at every start.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")


def _as_flag(name: str) -> str:
    return f"--{name}={','.join(_XLA_FLAGS[name])}"


def _xla_knows(*names: str) -> bool:
    """Whether the installed XLA knows flags and values: it aborts on an unknown one."""
    library = Path(jaxlib.__file__).parent / "libjax_common.so"
    if platform.machine() != "x86_64" or not library.is_file():
        return False  # not measured there
    with library.open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return all(text.find(name.encode()) >= 0 for name in names)


def fused_products() -> dict[str, str] | None:
    """XLA's flags for a CPU program that trains in float32, in place of `start`'s.

    YNNPACK then fuses products with what surrounds them: on 2 cores a step of the 10.8M
    model takes 6.0 s, and else 7.4. But bfloat16 it multiplies as such only where a
    product stands alone (2.8 s, and else 3.9); and what reads without a gradient is
    faster so: an evaluation takes 0.33 s, not 0.41, a token of 8 rows 7.0 ms, not 8.3.
    """
    if _as_flag(_YNN_FLAG) in os.environ.get("XLA_FLAGS", ""):
        return {_YNN_FLAG: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    return None


def _tell_unraisable(unraisable: Any) -> None:
    """Prints what Python can't raise, as it would, but for two kinds.

    `plain_errors` raises an interrupt again; and where one of a save's files finds no
    room, Orbax does not wait for the others.
    """
    error = unraisable.exc_value
    expected = isinstance(error, KeyboardInterrupt) or (
        "Event loop is closed" in str(error)
    )
    if not expected:
        sys.__unraisablehook__(unraisable)


def give_back_memory() -> None:
    """Frees what is no longer used, so that a long run does not grow (0.1 s).

    Without it, and with a heap for each thread, `python -m benchmarks.long_run` with
    an interval of 250 grew by 12% from step 2,000 to 20,000.
    """
    gc.collect()  # pictures and saves leave cycles behind
    if glibc := _glibc():
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of most Linux systems; None where it is another."""
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:
        return None


def _cpu_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write aside, then renames: the file at `path` is whole or not there.

    Makes the folder if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}{ASIDE}")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def log_line(line: str) -> None:
    """Prints a line on stderr, where all goes but a command's product.

    Of several processes only the first does.
    """
    if is_first_process():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the script with one line for what a user can mend, not with a traceback.

    JAXGPT_TRACEBACK=1 shows the traceback all the same. Ctrl-C exits with 130, SIGTERM
    with 143.
    """
    with _interrupts() as asked:
        try:
            yield
        except KeyboardInterrupt:
            _leave_interrupted(asked() or signal.SIGINT)
        except BrokenPipeError:  # its reader has gone, as in `generate.py | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            _leave(1)
        except _EXPECTED as error:
            if asked():  # the interrupt has become another error on its way
                _leave_interrupted(asked())
            _leave_with(error)


@contextmanager
def _interrupts() -> Iterator[Callable[[], int]]:
    """Raises KeyboardInterrupt on Ctrl-C and SIGTERM; gives the signal's number, or 0.

    It is raised again until it arrives: what is raised within a callback from C, as
    the garbage collector's are, is lost (of 300 interrupts of a starting run, five).
    """
    asked = 0

    def interrupt(number: int, frame: object) -> None:
        nonlocal asked
        asked = number
        if repeats:
            signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)
        raise KeyboardInterrupt

    def interrupt_again(number: int, frame: object) -> None:
        if signal.getsignal(asked) is not interrupt:  # it is deferred, and was noted
            signal.setitimer(signal.ITIMER_REAL, 0)
        if not _is_interrupted():
            signal.raise_signal(asked)

    handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), interrupt)
    repeats = hasattr(signal, "setitimer")  # not on Windows
    if repeats:
        handlers[signal.SIGALRM] = interrupt_again
    previous = {each: signal.signal(each, handlers[each]) for each in handlers}
    try:
        yield lambda: asked
    finally:
        if repeats:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for each, handler in previous.items():
            signal.signal(each, handler)


def _is_interrupted() -> bool:
    """Whether a KeyboardInterrupt is on its way through what has to be closed."""
    error = sys.exception()
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _leave_interrupted(number: int) -> NoReturn:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0)
    print("\ninterrupted", file=sys.stderr)
    _leave(128 + number)


def _leave_with(error: Exception) -> NoReturn:
    """Ends the script with a line on the error; raises what is the code's own fault."""
    out_of_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )
    lost = several_processes() and isinstance(error, (RuntimeError, TimeoutError))
    unexpected = isinstance(error, RuntimeError) and not (out_of_memory or lost)
    if os.environ.get("JAXGPT_TRACEBACK") or unexpected:
        if not several_processes():
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
    time.sleep(2 if several_processes() and is_first_process() else 0)
    os._exit(status)


class Interrupt:
    """What `deferred_interrupts` has caught.

    Attributes:
      signal: its number, or 0.
    """

    signal: int = 0
    _caught: int = 0
    _asked: jax.Array | int = 0

    def reached(self) -> bool:
        """Whether to stop here.

        All processes of a run stop at the same call, the one after the first that knew.
        """
        if several_processes():
            before, self._asked = self._asked, highest(self._caught)
            self.signal = int(before)
        else:
            self.signal = self._caught
        return bool(self.signal)


@contextmanager
def deferred_interrupts() -> Iterator[Interrupt]:
    """Notes the first Ctrl-C or SIGTERM; a second one acts as usual.

    A loop that asks between steps whether it is `reached` can save before it ends.
    """
    interrupt = Interrupt()
    previous: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        interrupt._caught = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for each in (signal.SIGINT, signal.SIGTERM):
        previous[each] = signal.signal(each, note)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
