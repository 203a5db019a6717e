"""What must be settled before JAX starts: flags, devices of a CPU, caches, memory.

The scripts call `start` first; `import jaxgpt` never does.
"""

import ctypes
import gc
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

_YNN = "xla_cpu_experimental_ynn_fusion_type"
_XLA_FLAGS = (
    # Products and sums by YNNPACK, on x86-64: on 2 cores a step of
    # `shakespeare-char-cpu` took 21.5 ms with the products, 29.0 without.
    f"--{_YNN}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
    # Products by cuBLAS alone: XLA would compile and time many of Triton's for each. On
    # an H100 `shakespeare-char` then takes 39 s to compile, not 60; steps are as fast.
    "--xla_gpu_enable_triton_gemm=false",
)


def cache_dir() -> Path:
    """Folder for corpora and compiled programs: $JAXGPT_CACHE or ~/.cache/jaxgpt."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("JAXGPT_CACHE") or Path(base) / "jaxgpt")


def start() -> None:
    """Sets what makes JAX fast here, and a persistent compilation cache.

    What the user has set stays: JAX_NUM_CPU_DEVICES, XLA_FLAGS, MALLOC_ARENA_MAX,
    JAX_COMPILATION_CACHE_DIR.
    """
    # Orbax warns of what is meant, and logs with a traceback what we tell in a line.
    # So does asyncio, where several arrays of a checkpoint can't be written or read.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine 'Store", RuntimeWarning)
    sys.unraisablehook = _report_unraisable
    flags = os.environ.get("XLA_FLAGS", "")
    if not (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in flags
    ):
        # XLA runs elementwise code on one thread per CPU device: on 2 cores a step of
        # `shakespeare-char-cpu` takes two devices 17.2 ms, one 18.2. At most 8, since
        # each holds a copy of the parameters.
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
            cores = len(os.sched_getaffinity(0))  # that this process may use
        jax.config.update("jax_num_cpu_devices", min(8, cores))
    for flag in _XLA_FLAGS:
        name, *values = re.findall(r"\w+", flag)
        if name not in flags and _xla_knows(name, *values):
            flags = f"{flags} {flag}".strip()
    os.environ["XLA_FLAGS"] = flags
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if "MALLOC_ARENA_MAX" not in os.environ:
        # Else each of many threads has a heap to grow. With one for all, a step of
        # `shakespeare-char-cpu` took 19.6 ms, with two 18.1.
        with suppress(OSError):  # not glibc
            ctypes.CDLL("libc.so.6").mallopt(-8, 2)  # M_ARENA_MAX
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # so JAX says that there is no TPU here
        # Where libtpu is installed for --plan, it would complain of it at every start.
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")


def _xla_knows(*names: str) -> bool:
    """Whether the installed XLA knows flags and values: it aborts on an unknown one."""
    library = Path(jaxlib.__file__).parent / "libjax_common.so"
    if platform.machine() != "x86_64" or not library.is_file():
        return False  # not measured there
    with library.open("rb") as file:
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return all(text.find(name.encode()) >= 0 for name in names)


def float32_matmul_flags() -> dict[str, str] | None:
    """XLA's flags for a CPU program that trains in float32, in place of `start`'s.

    YNNPACK then fuses products with what surrounds them: on 2 cores a step of the 10.8M
    model takes 6.0 s, and else 7.4. But bfloat16 it multiplies as such only where a
    product stands alone (2.8 s, and else 3.9); and what reads without a gradient is
    faster so: an evaluation takes 0.33 s, not 0.41, a token of 8 rows 7.0 ms, not 8.3.
    """
    if _XLA_FLAGS[0] in os.environ.get("XLA_FLAGS", ""):
        return {_YNN: "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}
    return None


def _report_unraisable(unraisable: Any) -> None:
    """Prints what Python can't raise, as it would, but for two kinds.

    `exits` has noted an interrupt; and where one of a checkpoint's files can't be
    written or read, Orbax does not wait for the others.
    """
    error, of_orbax = unraisable.exc_value, r"Event loop is closed|error while reading"
    expected = isinstance(error, KeyboardInterrupt) or re.search(of_orbax, str(error))
    if not expected:
        sys.__unraisablehook__(unraisable)


def release_memory() -> None:
    """Frees what is no longer used, so that a long run does not grow (0.1 s).

    Without it, and with a heap for each thread, `python -m benchmarks.long_run` with
    an interval of 250 grew by 12% from step 2,000 to 20,000.
    """
    gc.collect()  # pictures and saves leave cycles behind
    with suppress(OSError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
