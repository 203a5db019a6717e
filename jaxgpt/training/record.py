"""The record of a checkpoint: what its arrays were when it was saved, and how good."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

_METADATA = "_CHECKPOINT_METADATA"  # Orbax's, in which the record is custom_metadata
_DIGESTS = "digests.json"  # of the files of checkpoints from before there were records


def make_record(parts: dict[str, Any], metric: float) -> dict[str, Any]:
    """The record of a checkpoint with these parts, trees of arrays, as JSON has it.

    The validation metric is infinite if there is none.
    """
    record = {
        "figure": metric,
        "parts": list(parts),
        "shapes": shapes(parts["params"]),
        "checksums": checksums(parts),
    }
    return record | {"crc32": _crc32(record)}


def read_record(saved: Path) -> dict[str, Any]:
    """The record of the checkpoint in the folder `saved`.

    It has no checksums if the checkpoint is from before there were any. Raises
    ValueError if it is missing or damaged.
    """
    try:
        if (saved / _DIGESTS).exists():
            return _read_older_record(saved)
        text = (saved / _METADATA).read_text(encoding="utf-8")
        record = json.loads(text)["custom_metadata"]
        if record.pop("crc32") != _crc32(record):
            raise ValueError("it was altered")
        return record
    except PermissionError:
        raise
    except Exception as error:  # of many kinds
        raise ValueError(f"its record in {_METADATA} can't be read") from error


def _read_older_record(saved: Path) -> dict[str, Any]:
    files = json.loads((saved / _DIGESTS).read_text(encoding="utf-8"))
    metric, metrics = math.inf, "metrics/metrics"
    if metrics in files:
        metric = json.loads((saved / metrics).read_text(encoding="utf-8"))["val_loss"]
    parts = [part for part in ("params", "progress") if f"{part}/_METADATA" in files]
    folder = saved.absolute() / "params"
    params = ocp.StandardCheckpointHandler().metadata(folder)
    return {"figure": metric, "parts": parts, "shapes": shapes(params)}


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def checksums(tree: Any) -> dict[str, int]:
    """A number for each array of the tree, which is the same for every sharding."""
    found = jax.device_get(_checksums(_named(tree)))
    return {name: int(number) for name, number in found.items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    """A scalar, u32, that differs if any one element does.

    A bijection mixes each element's bits, plus a multiple of its index, and the sum is
    modulo 2**32. Unmixed, zeros, as which lost chunks are read, have the sum of ones.

    Source: Appleby, MurmurHash3 (fmix32).
    """
    bits = array.view(f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    for axis in range(array.ndim):
        stride = math.prod(array.shape[axis + 1 :]) * 0x9E3779B9 % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        bits += index * jnp.uint32(stride)
    bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
    return (bits ^ bits >> 16).sum(dtype=jnp.uint32)


def shapes(tree: Any) -> dict[str, list[int]]:
    """The shape of each array of the tree, by its name."""
    return {name: list(leaf.shape) for name, leaf in _named(tree).items()}


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
    }


def check_shapes(
    found: dict[str, list[int]], expected: dict[str, list[int]], checkpoint: str
) -> None:
    """Raises ValueError that names the first parameter of another shape.

    Args:
      found: the checkpoint's `shapes`.
      expected: those by the config.
      checkpoint: its name.
    """
    for name in sorted(found.keys() | expected.keys()):
        there, here = (
            tuple(shapes[name]) if name in shapes else "missing"
            for shapes in (found, expected)
        )
        if there != here:
            raise ValueError(
                f"checkpoint {checkpoint} is of another config: {name} is {there} "
                f"there, {here} by config.json; bring that run's own config.json back"
            )
