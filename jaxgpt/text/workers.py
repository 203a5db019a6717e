"""An ordered parallel map over processes that do not import JAX.

The module is also what such a process runs: it calls one function on each task that its
stdin has, and writes the results to its stdout, until its stdin is closed.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2  # tasks for each worker that are begun or wait, besides the one it has
# Of libraries: the workers are what runs in parallel.
_ONE_THREAD = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def ordered_map(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yields function(task) of each task in order, computed by worker processes.

    Only a few tasks and results are in memory. Close the generator to end the workers
    early; if this process is killed, they end by themselves.

    Args:
      function: of a module without JAX, or a `functools.partial` of one.
      tasks: made by the caller's thread, as they are needed.
      workers: number of processes, which are started as tasks come.

    Raises what the function raises, and ChildProcessError if a worker is killed.
    """
    own, processes = threading.local(), list[subprocess.Popen[bytes]]()

    def call(task: T) -> R:
        if not hasattr(own, "process"):
            processes.append(_start())
            own.process = processes[-1]
            pickle.dump(function, own.process.stdin)
        try:
            pickle.dump(task, own.process.stdin)
            own.process.stdin.flush()
            result, failure = pickle.load(own.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            status = own.process.wait()
            raise ChildProcessError(
                f"a worker process has ended with status {status}"
                + (", perhaps for lack of memory" if status == -9 else "")
                + "; run the same command again, perhaps with fewer --workers"
            ) from error
        if failure:
            raise failure
        return result

    threads = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            pending.append(threads.submit(call, task))
            if len(pending) >= workers * (1 + _AHEAD):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for process in processes:
            process.kill()
        threads.shutdown()
        for process in processes:
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    """Starts a worker, which finds the modules that this process has found."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.Popen(
        # -P: nothing in the current directory hides a module.
        [sys.executable, "-P", "-m", __spec__.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | dict.fromkeys(_ONE_THREAD, "1") | environment,
    )


def _work() -> None:
    """Calls the function that stdin begins with on each task that follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints
    sys.stdout = sys.stderr  # which, unlike a pipe, gets each line at once
    function = pickle.load(tasks)
    while True:
        try:
            task = pickle.load(tasks)
        except (EOFError, pickle.UnpicklingError):  # the parent process has ended
            break
        try:
            answer = pickle.dumps((function(task), None))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = pickle.dumps((None, error))
        try:
            results.write(answer)
            results.flush()
        except BrokenPipeError:
            os._exit(1)  # nor is the rest written, which would fail with a traceback


if __name__ == "__main__":
    _work()
