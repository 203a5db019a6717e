"""The processes of a run: how they find each other, agree, and write things once.

On a TPU pod or a cluster each host runs the same script, with its own part of the
devices; all call the same compiled programs in the same order.
"""

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def join_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the run's other processes, where there are any; before JAX starts.

    JAX finds those of a TPU pod, of `srun` and of `mpirun` by itself.

    Args:
      coordinator_address: HOST:PORT of process 0, the same for all.
      num_processes: of the run.
      process_id: of this one, from 0.

    Raises ValueError if only some are given, or they can't be.
    """
    # It would take SIGTERM from us, and Orbax and we can't both ask it in turns.
    jax.config.update("jax_enable_preemption_service", False)
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=30,
        shutdown_timeout_seconds=30,
    )
    given = (coordinator_address, num_processes, process_id)
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num-processes {num_processes} must be at least 1")
    if None not in (num_processes, process_id) and process_id not in range(
        num_processes or 0
    ):
        raise ValueError(
            f"--process-id {process_id} must be from 0 to --num-processes - 1"
        )
    if coordinator_address is not None and None not in given:
        port = re.fullmatch(r".+:(\d{1,5})", coordinator_address)
        if not port or int(port[1]) > 65_535:
            raise ValueError(
                f"--coordinator-address {coordinator_address} must be HOST:PORT"
            )
        print(
            f"process {process_id} of {num_processes} waits up to 5 minutes for the "
            f"others at {coordinator_address}",
            file=sys.stderr,
        )
        initialize(*given, cluster_detection_method="deactivate")
    elif given != (None, None, None):
        raise ValueError(
            "--coordinator-address, --num-processes and --process-id go together"
        )
    elif _is_task():
        try:
            initialize()
        except ValueError as error:
            raise ValueError(
                "this is one of several tasks, but JAX can't find the others; give "
                "--coordinator-address, --num-processes and --process-id"
            ) from error
    elif find_spec("libtpu") and not os.environ.get("TPU_SKIP_MDS_QUERY"):  # on a TPU
        with suppress(ValueError):  # not in Google's cloud, where JAX finds the others
            initialize()


def _is_task() -> bool:
    """Whether this is one of several tasks that srun or mpirun has started."""
    counts = [os.environ.get("OMPI_COMM_WORLD_SIZE")]
    if "SLURM_STEP_NODELIST" in os.environ:
        # Of srun's step; SLURM_NTASKS is the whole job's.
        counts.append(os.environ.get("SLURM_STEP_NUM_TASKS"))
    return any(int(count or 1) > 1 for count in counts)


def several_processes() -> bool:
    """Whether this is one of several processes of a run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(name: str) -> None:
    """Returns once every process of the run is here."""
    if several_processes():
        multihost_utils.sync_global_devices(name)


def process_share(items: list[Any]) -> list[Any]:
    """Those of the items that this process sees to, where all share the work."""
    if not several_processes():
        return items
    return items[jax.process_index() :: jax.process_count()]


def any_failed(failed: bool) -> bool:
    """Whether any process has failed at this point, which all must reach."""
    return bool(int(highest(failed)))


def highest(number: int) -> jax.Array | int:
    """The highest number that any process gives: soon, on every one of them.

    All must call it at the same point; it returns at once.
    """
    if not several_processes():
        return number
    own, (one_each, take_highest) = np.array([number], np.int32), _of_all_devices()
    return take_highest(
        jax.make_array_from_callback((jax.device_count(),), one_each, lambda index: own)
    )


def agreement() -> Callable[[int], int]:
    """Makes `agree(number)`: the highest number that any process gave the call before.

    All make each call at the same point, and none waits. One process alone agrees with
    itself at once.
    """
    before: jax.Array | int = 0

    def agree(number: int) -> int:
        nonlocal before
        last, before = before, highest(number)
        return int(last if several_processes() else number)

    return agree


@cache
def _of_all_devices() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Where an array of a number for each device lies, and what takes their highest."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    on_every_one = NamedSharding(mesh, P())
    return NamedSharding(mesh, P("all")), jax.jit(jnp.max, out_shardings=on_every_one)


def check_alike(settings: Any) -> None:
    """Raises ValueError if the run's processes have different settings."""
    if several_processes():
        own = np.frombuffer(sha256(repr(settings).encode()).digest(), np.uint32)
        every = multihost_utils.process_allgather(own)
        for process, other in enumerate(every):
            if not np.array_equal(other, every[0]):
                raise ValueError(
                    f"process {process} has other settings or another corpus than "
                    "process 0; start all with the same command line but --process-id"
                )
