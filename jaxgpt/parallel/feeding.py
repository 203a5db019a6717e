"""Feeds batches to the devices; each process reads the rows of its own devices.

N steps in one dispatch   B batch
"""

from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.parallel.mesh import batch_sharding
from jaxgpt.text.batches import Source, longest_row


def stack_batches(source: Source, steps: range, rows: slice = slice(None)) -> Any:
    """Stacks `rows` of the batches of several steps, with leaves [N, B, ...].

    Batches of different lengths are padded with zeros to the longest.
    """
    batches = [source(step, rows) for step in steps]
    return jax.tree.map(_stack_padded, *batches)


def _stack_padded(*leaves: np.ndarray) -> np.ndarray:
    shape = np.max([leaf.shape for leaf in leaves], axis=0)
    if all(leaf.shape == tuple(shape) for leaf in leaves):
        return np.stack(leaves)
    pad = (zip(0 * shape, shape - leaf.shape, strict=True) for leaf in leaves)
    return np.stack([np.pad(a, [*p]) for a, p in zip(leaves, pad, strict=True)])


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
    """Shapes and shardings of `count` of the longest batches, without memory."""
    rows, B = batch_sharding(mesh, axis=1), config.data.batch_size
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (count, B, *leaf.shape[1:]), leaf.dtype, sharding=rows
        ),
        longest_row(config),
    )
