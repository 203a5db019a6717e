"""The record of a checkpoint: shapes and checksums of its arrays, and its metric."""

import json
import math
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxgpt.files import plain_path

_METADATA = "_CHECKPOINT_METADATA"  # Orbax's; the record is its custom_metadata


def make_record(parts: dict[str, Any], metric: float) -> dict[str, Any]:
    """Makes the JSON record of a checkpoint from its parts, which are array trees.

    The validation metric is infinite if the parameters were not evaluated.
    """
    record = {
        "figure": metric,
        "parts": list(parts),
        "shapes": shapes(parts["params"]),
        "checksums": checksums(parts),
    }
    return record | {"crc32": _crc32(record)}


def read_record(saved: Path) -> dict[str, Any]:
    """Reads the record of the checkpoint in the folder `saved`.

    Records of checkpoints from older versions have no checksums. Raises ValueError if
    the record is missing or damaged.
    """
    try:
        text = (saved / _METADATA).read_text(encoding="utf-8")
        metadata = json.loads(text)
        record = metadata["custom_metadata"]
        if not record:
            return _older_record(saved, metadata["item_handlers"])
        if record.pop("crc32") != _crc32(record):
            raise ValueError("it was altered")
        return record
    except PermissionError:
        raise
    except Exception as error:  # a damaged record may raise anything
        raise ValueError(f"its record in {_METADATA} can't be read") from error


def _older_record(saved: Path, items: Collection[str]) -> dict[str, Any]:
    """Makes the record of a checkpoint with these items, from before there were any."""
    metric = math.inf
    if "metrics" in items:
        text = (saved / "metrics" / "metrics").read_text(encoding="utf-8")
        metric = json.loads(text)["val_loss"]
    parts = [part for part in ("params", "progress") if part in items]
    with plain_path(saved) as path:
        params = ocp.StandardCheckpointHandler().metadata(path / "params")
    return {"figure": metric, "parts": parts, "shapes": shapes(params)}


def _crc32(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of each array in the tree; it does not depend on the sharding.

    Leaves of the tree that are ocp.PLACEHOLDER have none.
    """
    found = jax.device_get(_checksums(_arrays(tree)))
    return {name: int(number) for name, number in found.items()}


def non_finite_array(tree: Any) -> str | None:
    """Name of the first array in the tree that is not finite, or None."""
    finite = jax.device_get(_all_finite(_arrays(tree)))
    return next((name for name in finite if not finite[name]), None)


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


@jax.jit
def _checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    """A u32 scalar that changes if any one element changes.

    Sums, modulo 2**32, a bijective hash of each element's bits plus a multiple of its
    index. Unhashed, zeros (as lost chunks are read) could have the same sum as ones.

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
    """The shape of each array in the tree, by name."""
    return {name: list(leaf.shape) for name, leaf in _arrays(tree).items()}


def _arrays(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in leaves
        if leaf is not ocp.PLACEHOLDER
    }


def check_shapes(
    found: dict[str, list[int]], expected: dict[str, list[int]], checkpoint: str
) -> None:
    """Raises ValueError that names the first parameter whose shape differs.

    Args:
      found: the `shapes` in the checkpoint.
      expected: the `shapes` according to the config.
      checkpoint: name of the checkpoint, for the message.
    """
    for name in sorted(found.keys() | expected.keys()):
        there, here = (
            tuple(shapes[name]) if name in shapes else "missing"
            for shapes in (found, expected)
        )
        if there != here:
            raise ValueError(
                f"checkpoint {checkpoint} was saved with another config: {name} is "
                f"{there} there and {here} here; use the config that it was saved with"
            )
