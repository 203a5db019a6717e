"""The device mesh, and the rules that shard parameters and activations over it.

The mesh has three axes. "data" shards the rows of a batch. "fsdp" shards them too, and
also every matrix and its moments; each layer's matrices are gathered when the layer
runs. "tensor" shards the heads and MLP channels, and elsewhere the positions, of the
same rows.

Source: Rajbhandari et al. 2020 (ZeRO) for fsdp; Shoeybi et al. 2019 (Megatron-LM) and
Korthikanti et al. 2022 (sequence parallelism) for tensor.

L layers   V vocab   T block_size   C n_embd   H heads   D head_dim   F mlp   B batch
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import Config, MeshConfig, ModelConfig
from jaxgpt.parallel.defaults import prefers_one_device

AXES = ("data", "fsdp", "tensor")

# The sharding of each parameter, by the end of its path; the first match applies.
# Vectors are small, so they are replicated, except biases of sharded heads or channels.
RULES: tuple[tuple[str, P], ...] = (
    ("wte/embedding", P(None, ("fsdp", "tensor"))),  # V C
    ("wpe/embedding", P(None, ("fsdp", "tensor"))),  # T C
    (
        r"(cross_)?attn/c_attn/kernel",
        P(None, "fsdp", None, "tensor", None),
    ),  # L C 3 H D
    (r"(cross_)?attn/c_attn/bias", P(None, None, "tensor", None)),  # L 3 H D
    (r"(cross_)?attn/c_proj/kernel", P(None, "tensor", None, "fsdp")),  # L H D C
    ("mlp/c_fc/kernel", P(None, "fsdp", "tensor")),  # L C F
    ("mlp/c_fc/bias", P(None, "tensor")),  # L F
    ("mlp/c_proj/kernel", P(None, "tensor", "fsdp")),  # L F C
    ("dense/kernel", P(None, ("fsdp", "tensor"))),  # C C
    (r"(c_proj|dense)/bias|ln_\w+/(scale|bias)|(classifier|reward|value)/.*", P()),
    # The lecture's own models are small, so they are replicated.
    (r"(table|token_embedding|position_embedding)/embedding", P()),
    (r"(block_\d+|lm_head)/.*", P()),
)

# The sharding of activations, by the names that models give to their axes. A mesh axis
# shards only one axis of an activation, so heads and channels come before positions.
ACTIVATIONS = (
    ("batch", ("data", "fsdp")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("time", "tensor"),
)


def make_mesh(
    config: Config,
    log: Callable[[str], None] = print,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Arranges devices in a mesh as `config.mesh` specifies, and logs idle ones.

    Args:
      devices: by default all that JAX finds, or only the first one for a large model
        on CPU devices of one process, if `config.mesh` has its default values.

    Raises ValueError if there are too few, or if the work does not divide evenly.
    """
    if devices is None:
        devices = jax.devices()
        undecided = config.mesh == MeshConfig() and jax.process_count() == 1
        if undecided and devices[1:] and prefers_one_device(devices[0], config.model):
            log(f"using 1 of {len(devices)} CPU devices, to store the model only once")
            devices = devices[:1]
    shape, rows = _mesh_shape(config, len(devices)), config.rows_at_once
    count = math.prod(shape)
    used = devices[:count]
    if idle := {d.process_index for d in devices} - {d.process_index for d in used}:
        raise ValueError(
            f"{count} of {len(devices)} devices are used for {rows} rows at once, "
            f"which leaves process {min(idle)} without a device; use a larger "
            "batch_size or fewer processes"
        )
    if count < len(devices):
        log(f"using {count} of {len(devices)} devices, for {rows} rows at once")
        return Mesh(np.reshape(used, shape), AXES)
    return Mesh(
        mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True), AXES
    )


def _mesh_shape(config: Config, devices: int) -> tuple[int, ...]:
    """Sizes of the mesh's axes, where -1 becomes the largest size that divides evenly.

    fsdp is resolved first and must divide the rows and n_embd; then data, which must
    divide the rows.
    """
    shape = {axis: getattr(config.mesh, axis) for axis in AXES}
    rows, block_size = config.rows_at_once, config.model.block_size
    for axis, width in (("fsdp", getattr(config.model, "n_embd", 0)), ("data", 0)):
        if shape[axis] == -1:
            used = math.prod(size for size in shape.values() if size != -1)
            row_shards = used // shape["tensor"]
            shape[axis] = 1
            for n in range(2, devices // used + 1):
                if rows % (row_shards * n) == 0 and width % (shape["tensor"] * n) == 0:
                    shape[axis] = n
    requested = " x ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
    if math.prod(shape.values()) > devices:
        raise ValueError(
            f"{requested}, but there are {devices} devices; use a smaller mesh"
        )
    if rows % (shape["data"] * shape["fsdp"]):
        raise ValueError(
            f"{rows} sequences at once (batch_size / gradient_accumulation_steps) do "
            f"not divide over mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']} "
            "devices; use a multiple of the number of devices"
        )
    if block_size % shape["tensor"]:
        raise ValueError(
            f"block_size={block_size} does not divide over mesh.tensor="
            f"{shape['tensor']} devices; use a multiple of mesh.tensor"
        )
    return tuple(shape.values())


def single_device_mesh(backend: str | None = None) -> Mesh:
    """A mesh of this process's first device."""
    return Mesh(np.reshape(jax.local_devices(backend=backend)[:1], (1, 1, 1)), AXES)


def host_mesh() -> Mesh:
    """A mesh of one CPU device, because host memory is larger than device memory."""
    try:
        return single_device_mesh("cpu")
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return single_device_mesh()


def model_mesh(config: Config, mesh: MeshConfig) -> Mesh:
    """The mesh to shard the parameters over, where there is no batch to shard.

    Raises ValueError if `mesh.data` is not 1, and as `make_mesh` does.
    """
    if mesh.data != 1:
        raise ValueError(
            f"mesh.data={mesh.data} has no effect here; use mesh.fsdp or mesh.tensor"
        )
    rows = mesh.fsdp if mesh.fsdp > 0 else jax.device_count()
    data = dataclasses.replace(
        config.data, batch_size=rows, gradient_accumulation_steps=1
    )
    config = dataclasses.replace(config, data=data, mesh=mesh, ppo=None, grpo=None)
    return make_mesh(config, lambda line: None)


def data_parallel_mesh(
    model: ModelConfig, params: Any, rows: int, min_rows: int
) -> Mesh | None:
    """The mesh to shard rows over in generation, with parameters replicated.

    None if fewer than two devices would get `min_rows` rows each, if the parameters are
    sharded already, or if the model is large and on a CPU, whose devices share memory.
    """
    device, *others = jnp.asarray(jax.tree.leaves(params)[0]).devices()
    if others or prefers_one_device(device, model):
        return None
    devices = jax.local_devices(backend=device.platform)
    max_count = min(len(devices), rows // min_rows)
    count = max((n for n in range(1, max_count + 1) if rows % n == 0), default=1)
    return Mesh(np.reshape(devices[:count], (-1, 1, 1)), AXES) if count > 1 else None


def with_shardings(shapes: Any, mesh: Mesh) -> Any:
    """Adds the sharding of each parameter or moment to its shape."""
    where = shardings(shapes, mesh)
    return jax.tree.map(lambda leaf, s: leaf.update(sharding=s), shapes, where)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each parameter or moment in a tree, by RULES.

    Scalars are replicated. Raises ValueError that names a parameter without a rule, or
    with a dimension that does not divide evenly over its devices.
    """

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        matches = (spec for end, spec in RULES if re.fullmatch(f"(.*/)?({end})", name))
        spec = next(matches, None) if leaf.ndim else P()
        if spec is None:
            raise ValueError(
                f"no rule says how to shard {name}; add one to {__name__}.RULES"
            )
        for size, axes in zip(leaf.shape, spec, strict=False):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            devices = math.prod(mesh.shape[axis] for axis in axes)
            if size % devices:
                raise ValueError(
                    f"{name} {list(leaf.shape)}: {size} does not divide over "
                    + " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
                    + "; use fewer devices on that axis"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds in full."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of batches whose rows are along `axis`."""
    return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


@contextmanager
def activation_sharding(mesh: Mesh) -> Iterator[None]:
    """Context in which traced models shard their activations over the mesh."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATIONS):
        yield
