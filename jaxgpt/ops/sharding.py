"""Custom kernels on several devices, which XLA cannot shard by itself."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P


def per_device(
    function: Callable[..., Any], names: tuple[str, ...]
) -> Callable[..., Any]:
    """Calls `function` on each device's shard of its arguments.

    Args:
      function: maps arrays to arrays, all with the same leading axes.
      names: logical names of those axes, by which `jaxgpt.parallel.mesh` shards them.
    """
    spec = nn.logical_to_mesh_axes(names)
    if all(axis is None for axis in spec):  # no mesh, or inside of shard_map
        return function
    # Outputs of kernels do not say over which mesh axes they vary (VMA).
    return jax.shard_map(
        function, in_specs=P(*spec), out_specs=P(*spec), check_vma=False
    )
