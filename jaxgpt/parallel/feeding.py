"""Batches reach the devices: each process reads the rows of its own.

N steps in one call   B batch
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
    """The batches of several steps, their leaves [N, B, ...]; `rows` are of each B."""
    batches = [source(step, rows) for step in steps]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def read_batches(source: Source, steps: range, batch_size: int, mesh: Mesh) -> Any:
    """As `stack_batches`, on the mesh; reads the rows of this process's devices."""
    sharding, B = batch_sharding(mesh, axis=1), batch_size

    @cache
    def rows(first: int, last: int) -> Any:
        return stack_batches(source, steps, slice(first, last))

    def read(index: Any) -> Any:
        return rows(*index[1].indices(B)[:2])

    def place(i: int, shape: tuple[int, ...]) -> jax.Array:
        shape = (len(steps), B, *shape[2:])
        return jax.make_array_from_callback(
            shape, sharding, lambda index: jax.tree.leaves(read(index))[i]
        )

    own = sharding.addressable_devices_indices_map((len(steps), B))
    leaves, structure = jax.tree.flatten(read(next(iter(own.values()))))
    arrays = [place(i, leaf.shape) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, arrays)


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Places a batch that every process has in full; each keeps its devices' rows."""
    place = partial(jax.make_array_from_callback, sharding=batch_sharding(mesh))
    return jax.tree.map(
        lambda leaf: place(leaf.shape, data_callback=leaf.__getitem__), batch
    )


def batch_shapes(config: Config, mesh: Mesh, count: int) -> Any:
    """Shapes of `count` batches of next-token windows, without their memory."""
    shape = (count, config.data.batch_size, config.model.block_size)
    rows = batch_sharding(mesh, axis=1)
    tokens_NBT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    return tokens_NBT, tokens_NBT
