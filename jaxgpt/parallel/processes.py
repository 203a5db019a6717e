"""Multi-process runs: connects the processes, and lets them agree and synchronise.

On a TPU pod or a cluster, each host runs the same script with its own devices. All
processes must call the same compiled programs in the same order.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Environment variables with the number of tasks that mpirun or srun has started.
_TASKS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def join_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connects to the other processes of the run, if any; call before JAX starts.

    JAX finds them by itself on a TPU pod and under `srun` or `mpirun`.

    Args:
      coordinator_address: HOST:PORT of process 0, the same for all processes.
      num_processes: number of processes in the run.
      process_id: index of this process, from 0.

    Raises ValueError if only some arguments are given, or if they are invalid.
    """
    # JAX's preemption service would handle SIGTERM itself, and reports it only once.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=30,
        shutdown_timeout_seconds=30,
    )
    given = (coordinator_address, num_processes, process_id)
    if coordinator_address and num_processes is not None and process_id is not None:
        port = re.fullmatch(r".+:(\d{1,5})", coordinator_address)
        if not port or int(port[1]) > 65_535:
            raise ValueError(
                f"--coordinator-address {coordinator_address} must be HOST:PORT"
            )
        if process_id not in range(num_processes):
            raise ValueError(
                f"--process-id {process_id} must be at least 0, and less than "
                f"--num-processes {num_processes}"
            )
        print(
            f"process {process_id} of {num_processes} is waiting up to 5 minutes for "
            f"the others at {coordinator_address}",
            file=sys.stderr,
        )
        initialize(*given, cluster_detection_method="deactivate")
    elif given != (None,) * 3:
        raise ValueError(
            "--coordinator-address, --num-processes and --process-id must all be given"
        )
    elif any(int(os.environ.get(tasks) or 1) > 1 for tasks in _TASKS):
        try:
            initialize()
        except ValueError as error:
            raise ValueError(
                "this is one of several tasks, but JAX can't find the others; give "
                "--coordinator-address, --num-processes and --process-id"
            ) from error
    elif find_spec("libtpu") and not os.environ.get("TPU_SKIP_MDS_QUERY"):  # on a TPU
        with suppress(ValueError):  # outside Google Cloud, JAX can't find the others
            initialize()


def several_processes() -> bool:
    """Whether the run has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Blocks until every process of the run has reached this call."""
    if several_processes():
        multihost_utils.sync_global_devices(name)


def any_failed(failed: bool) -> bool:
    """Whether `failed` is true in any process; all must call it at the same point."""
    return bool(max_over_processes(failed))


def max_over_processes(number: int) -> jax.Array | int:
    """Maximum of `number` over all processes, which all must call at the same point.

    It returns without waiting; only reading the result waits for the other processes.
    """
    if not several_processes():
        return number
    devices, own = jax.devices(), np.array([number], np.int32)
    one_each = NamedSharding(Mesh(devices, "all"), P("all"))
    return jnp.max(
        jax.make_array_from_callback((len(devices),), one_each, lambda index: own)
    )


def make_agree() -> Callable[[int], int]:
    """Makes `agree(number)`, which all processes must call at the same point.

    It returns the maximum over all processes of the numbers in the previous call (at
    first 0), so that no call waits. A single process gets its own number.
    """
    before: jax.Array | int = 0

    def agree(number: int) -> int:
        nonlocal before
        last, before = before, max_over_processes(number)
        return int(last if several_processes() else number)

    return agree


def check_same_settings(settings: Any) -> None:
    """Raises ValueError if the run's processes have different settings."""
    if several_processes():
        own = np.frombuffer(sha256(repr(settings).encode()).digest(), np.uint32)
        every = multihost_utils.process_allgather(own)
        for process, other in enumerate(every):
            if not np.array_equal(other, every[0]):
                raise ValueError(
                    f"process {process} has different settings or a different corpus "
                    "from process 0; start all with the same flags except --process-id"
                )
