"""Custom kernels on several devices, which XLA cannot shard by itself."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec as P


def per_device(
    function: Callable[..., Any], names: tuple[str, ...], shape: tuple[int, ...]
) -> Callable[..., Any] | None:
    """Returns a function that calls `function` on each device's shard.

    Args:
      function: maps arrays to arrays, all with the same leading axes.
      names: logical names of these axes, by which `jaxgpt.parallel.mesh` shards them.
      shape: their sizes. If one does not divide evenly over its devices, returns None.
    """
    mesh, spec = jax.sharding.get_abstract_mesh(), nn.logical_to_mesh_axes(names)
    if mesh.empty:
        return function
    for size, axes in zip(shape, spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if size % math.prod(mesh.shape[axis] for axis in axes):
            return None
    # Outputs of kernels do not say over which mesh axes they vary (VMA).
    return jax.shard_map(
        function, in_specs=P(*spec), out_specs=P(*spec), check_vma=False
    )
