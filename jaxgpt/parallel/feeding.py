"""Feeds batches to the devices; each process reads the rows of its own devices.

N steps in one dispatch   B batch
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.parallel.mesh import batch_sharding
from jaxgpt.text.batches import Source


def stack_batches(source: Source, steps: range, rows: slice = slice(None)) -> Any:
    """Stacks `rows` of the batches of several steps, with leaves [N, B, ...]."""
    batches = [source(step, rows) for step in steps]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def read_batches(source: Source, steps: range, batch_size: int, mesh: Mesh) -> Any:
    """`stack_batches`, sharded over the mesh; reads only this process's rows."""
    sharding, B = batch_sharding(mesh, axis=1), batch_size

    @cache
    def read_rows(start: int, stop: int) -> Any:
        return stack_batches(source, steps, slice(start, stop))

    def read(index: Any) -> Any:
        return read_rows(*index[1].indices(B)[:2])

    def make_array(i: int, shape: tuple[int, ...]) -> jax.Array:
        shape = (len(steps), B, *shape[2:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: jax.tree.leaves(read(index))[i]
        )

    own = sharding.addressable_devices_indices_map((len(steps), B))
    leaves, structure = jax.tree.flatten(read(next(iter(own.values()))))
    arrays = [make_array(i, leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Shards a batch that every process holds in full over the mesh."""
    shard = partial(jax.make_array_from_callback, sharding=batch_sharding(mesh))
    return jax.tree.map(
        lambda leaf: shard(leaf.shape, data_callback=leaf.__getitem__), batch
    )


def batch_shapes(config: Config, mesh: Mesh, count: int) -> Any:
    """Shapes and shardings of `count` next-token batches, without allocating memory."""
    shape = (count, config.data.batch_size, config.model.block_size)
    rows = batch_sharding(mesh, axis=1)
    tokens_NBT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    leaves = 3 if config.data.packing == "documents" else 2  # inputs, targets, segments
    return (tokens_NBT,) * leaves
