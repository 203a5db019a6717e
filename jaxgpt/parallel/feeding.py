"""Batches reach the devices: each process reads the rows of its own.

B batch   T time
"""

from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.parallel.mesh import over_rows
from jaxgpt.text.batches import stack_batches


def share_rows(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Places a batch that every process has in full; each keeps its devices' rows."""
    return jax.make_array_from_callback(array.shape, over_rows(mesh), array.__getitem__)


def read_batches(
    tokens: np.ndarray, steps: range, config: Config, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """The training batches of several steps, inputs and targets, i32 [steps, B, T].

    Each process reads the rows of its own devices, and no others.
    """
    B = config.data.batch_size
    shape, sharding = (len(steps), B, config.model.block_size), over_rows(mesh, axis=1)

    @cache
    def rows(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return stack_batches(tokens, steps, config, slice(first, last))

    def place(which: int) -> jax.Array:
        def read(index: Any) -> np.ndarray:
            return rows(*index[1].indices(B)[:2])[which]

        return jax.make_array_from_callback(shape, sharding, read)

    return place(0), place(1)
