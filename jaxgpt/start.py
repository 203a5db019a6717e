"""Process setup before JAX starts: XLA flags, CPU devices, caches and memory.

The scripts call `start` first; a name imported from `jaxgpt` calls only
`quiet_libtpu`.
"""

import ctypes
import gc
import io
import logging
import mmap
import os
import platform
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jaxlib

from jaxgpt.terminal import log_line

_YNN = "xla_cpu_experimental_ynn_fusion_type"
_COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event
_XLA_FLAGS = (
    # Run matmuls and reductions in YNNPACK, on x86-64: on 2 cores a step of
    # `shakespeare-char-cpu` took 21.5 ms with the matmuls in it, 29.0 without.
    f"--{_YNN}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    # Run matmuls in cuBLAS only; XLA would compile and time many Triton kernels for
    # each. On an H100 `shakespeare-char` compiles in 39 s, not 60, and runs as fast.
    "--xla_gpu_enable_triton_gemm=false",
    # Take cuBLAS's own choice of algorithm. Timing others took 24 of the 37 s until a
    # first step on an H100, and a step of `gpt2-124m` is as fast without (27.9 ms).
    "--xla_gpu_autotune_level=0",
    # Keep matmuls of the same input apart, as the models have them: XLA would join the
    # projections to queries, keys and values, and copy each out of the result.
    "--xla_gpu_dot_merger_threshold_mb=0",
)


def cache_dir() -> Path:
    """Folder for corpora and compiled programs: $JAXGPT_CACHE or ~/.cache/jaxgpt.

    Creates it. Raises OSError that names JAXGPT_CACHE if that fails.
    """
    try:
        path = Path(os.environ.get("JAXGPT_CACHE") or _default_cache_dir())
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError if there is no home
        raise OSError(
            f"there is no cache ({error}); set JAXGPT_CACHE to a folder that can be "
            "written"
        ) from error
    return path


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxgpt")


def start() -> None:
    """Configures JAX for speed, and sets up a persistent compilation cache.

    Environment variables that are already set take precedence: JAX_NUM_CPU_DEVICES,
    XLA_FLAGS, MALLOC_ARENA_MAX, JAX_COMPILATION_CACHE_DIR.
    """
    quiet_libtpu()
    # Orbax warns about intended use, and logs tracebacks of errors that we report in a
    # line; so does asyncio if several arrays of a checkpoint can't be read or written.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '(Store|_read)", RuntimeWarning)
    sys.unraisablehook = _report_unraisable
    flags = os.environ.get("XLA_FLAGS", "")
    if not (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in flags
    ):
        # XLA runs elementwise code on one thread per CPU device: on 2 cores a step of
        # `shakespeare-char-cpu` takes 17.2 ms with two devices, 18.2 with one. At most
        # 8, since each holds a copy of the parameters.
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
            cores = len(os.sched_getaffinity(0))  # those this process may use
        jax.config.update("jax_num_cpu_devices", min(8, cores))
    for flag in _XLA_FLAGS:
        name, *values = re.findall(r"\w+", flag)
        if name not in flags and _measured_and_known(name, *values):
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with suppress(OSError, UnicodeError):  # no cache is needed
            if os.access(cache := cache_dir(), os.W_OK) and str(cache).encode():
                jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "MALLOC_ARENA_MAX" not in os.environ:
        # By default malloc gives threads their own arenas, each of which can grow. A
        # step of `shakespeare-char-cpu` took 19.6 ms with one arena, 18.1 with two.
        with suppress(OSError):  # not glibc
            ctypes.CDLL("libc.so.6").mallopt(-8, 2)  # M_ARENA_MAX
    if not os.access(os.path.expanduser("~"), os.W_OK):
        with suppress(OSError):  # else matplotlib warns of a temporary folder
            os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    jax.monitoring.register_event_duration_secs_listener(tell_compilation)
    encode_output()


def tell_compilation(event: str, duration_secs: float, **facts: str | int) -> None:
    """Prints the name of a program whose compilation took over 5 s, and the seconds."""
    if event == _COMPILED and duration_secs > 5:
        name = str(facts.get("fun_name", "a program"))
        program = re.sub(r"^jit\(_?(.*)\)$", r"\1", name)
        log_line(f"compiled {program} in {duration_secs:.1f} s")


def encode_output() -> None:
    """Makes a file or a pipe get UTF-8, whatever the locale is.

    A terminal shows "?" for what it can't. So do all for surrogates, which arguments
    and names of files that are not UTF-8 become.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if it is closed
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace")


def quiet_libtpu() -> None:
    """Keeps libtpu, which --plan needs, silent where there is no TPU.

    It would complain at every start, and of log files that belong to another user.
    """
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # `import jax` sets it if there is no TPU
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_LOG_DIR", "disabled")


def _measured_and_known(*names: str) -> bool:
    """Whether this is x86-64, and XLA knows the flags; it aborts on unknown ones."""
    library = Path(jaxlib.__file__).parent / "libjax_common.so"
    if platform.machine() != "x86_64" or not library.is_file():
        return False  # not measured there
    with library.open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return all(text.find(name.encode()) >= 0 for name in names)


def float32_matmul_flags() -> dict[str, str] | None:
    """XLA flags for CPU programs that train in float32; they override `start`'s.

    YNNPACK then fuses matmuls with the operations around them: on 2 cores a step of the
    10.8M model takes 6.0 s, not 7.4. Other programs are faster unfused: YNNPACK uses
    bfloat16 only in unfused matmuls (a step takes 2.8 s, not 3.9), an evaluation takes
    0.33 s, not 0.41, a token of 8 rows 7.0 ms, not 8.3. None if `start` set no flag.
    """
    if _XLA_FLAGS[0] in os.environ.get("XLA_FLAGS", ""):
        return {_YNN: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    return None


def _report_unraisable(unraisable: Any) -> None:
    """Prints unraisable exceptions, except for two expected kinds.

    `exits` has already recorded a KeyboardInterrupt, and Orbax does not wait for the
    other files of a checkpoint if one can't be read or written.
    """
    error, orbax = unraisable.exc_value, r"Event loop is closed|error while reading"
    expected = isinstance(error, KeyboardInterrupt) or re.search(orbax, str(error))
    if not expected:
        sys.__unraisablehook__(unraisable)


def release_memory() -> None:
    """Returns unused memory to the system, in 0.1 s, so that a long run does not grow.

    Without it, and with a malloc arena per thread, `python -m benchmarks.long_run` with
    an interval of 250 grew by 12% from step 2,000 to 20,000.
    """
    gc.collect()  # plots and saves leave reference cycles behind
    with suppress(OSError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
