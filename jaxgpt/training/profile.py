"""A profiler trace of a few dispatches, on demand."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxgpt.files import is_first_process, plain_path
from jaxgpt.terminal import log_line


@contextmanager
def profiled(folder: Path, calls: int) -> Iterator[Callable[[Any], None]]:
    """Traces `calls` dispatches, starting with the second, as the first is slower.

    Yields a function to call with the result of each dispatch. The trace can be opened
    in TensorBoard and Perfetto. Only the first process is traced.
    """
    done, calls = 0, calls if is_first_process() else 0

    def called(result: Any) -> None:
        nonlocal done
        done += 1
        if calls and done in (1, 1 + calls):
            jax.block_until_ready(result)
            tracing.close()
            if done == 1:
                folder.mkdir(parents=True, exist_ok=True)
                path = tracing.enter_context(plain_path(folder))
                jax.profiler.start_trace(path, create_perfetto_trace=True)
                tracing.callback(stop)

    def stop() -> None:
        jax.profiler.stop_trace()
        log_line(f"traced {done - 1} dispatches into {folder}")

    with ExitStack() as tracing:
        yield called
