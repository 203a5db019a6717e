"""How devices share the work: each takes its rows of the batch."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgpt.config import Config


def make_mesh(config: Config, log: Callable[[str], None] = print) -> Mesh:
    """Arranges `mesh.data` devices along the axis "data"; log hears of idle ones.

    Raises ValueError if there are not as many devices, or they do not divide the rows
    that run at once.
    """
    devices = jax.devices()
    count, rows = config.mesh.data, config.data.rows_at_once
    if count == -1:
        count = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if count > len(devices):
        raise ValueError(f"mesh.data={count}, but there are {len(devices)} devices")
    if rows % count:
        raise ValueError(
            f"{rows} sequences at once (batch_size / gradient_accumulation_steps) do "
            f"not divide over mesh.data={count} devices; make them a multiple of it"
        )
    if count < len(devices):
        log(f"using {count} of {len(devices)} devices, for {rows} rows at once")
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count]
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of what every device holds in full: the train state."""
    return NamedSharding(mesh, PartitionSpec())


def over_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Placement of batches, whose rows are along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))
