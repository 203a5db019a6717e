"""How devices share the work: the mesh, and one table of rules for the parameters.

The mesh has three axes. Over "data" the devices share the rows of a batch. Over "fsdp"
they do too, and each keeps only its part of every matrix and of its moments; a layer's
matrices are gathered when their turn comes. Over "tensor" they share the heads and the
MLP's channels of the same rows, and the positions everywhere else.

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

# How each parameter is cut, by the end of its path; the first rule that fits counts.
# Vectors are small: a device holds them whole, but for what belongs to its own heads.
RULES: tuple[tuple[str, P], ...] = (
    ("wte/embedding", P(None, ("fsdp", "tensor"))),  # V C
    ("wpe/embedding", P(None, ("fsdp", "tensor"))),  # T C
    ("attn/c_attn/kernel", P(None, "fsdp", None, "tensor", None)),  # L C 3 H D
    ("attn/c_attn/bias", P(None, None, "tensor", None)),  # L 3 H D
    ("attn/c_proj/kernel", P(None, "tensor", None, "fsdp")),  # L H D C
    ("mlp/c_fc/kernel", P(None, "fsdp", "tensor")),  # L C F
    ("mlp/c_fc/bias", P(None, "tensor")),  # L F
    ("mlp/c_proj/kernel", P(None, "tensor", "fsdp")),  # L F C
    (r"c_proj/bias|ln_\w/(scale|bias)", P()),
    # The lecture's own models are small: every device holds them whole.
    (r"(table|token_embedding|position_embedding)/embedding", P()),
    (r"(block_\d+|lm_head)/.*", P()),
)

# How activations are cut, by the names that the models give to their axes. Heads and
# channels come before positions: an axis of the mesh cuts but one of an activation's.
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
    """Arranges devices as `config.mesh` says; log hears of idle ones.

    Args:
      devices: all that JAX has found if left out; of one CPU's only the first, where
        the model is large and the config leaves it open.

    Raises ValueError if there are not as many, or what they share does not divide.
    """
    if devices is None:
        devices = jax.devices()
        undecided = config.mesh == MeshConfig() and jax.process_count() == 1
        if undecided and devices[1:] and prefers_one_device(devices[0], config.model):
            log(f"using 1 of {len(devices)} CPU devices: each would hold a copy")
            devices = devices[:1]
    shape, rows = _mesh_shape(config, len(devices)), config.data.microbatch_size
    count = math.prod(shape)
    used = devices[:count]
    if idle := {d.process_index for d in devices} - {d.process_index for d in used}:
        raise ValueError(
            f"{count} of {len(devices)} devices share {rows} rows at once, which "
            f"leaves process {min(idle)} without one; give more rows, or start fewer "
            "processes"
        )
    if count < len(devices):
        log(f"using {count} of {len(devices)} devices, for {rows} rows at once")
        return Mesh(np.reshape(used, shape), AXES)
    return Mesh(
        mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True), AXES
    )


def _mesh_shape(config: Config, devices: int) -> tuple[int, ...]:
    """Sizes of the mesh's axes; one of -1 takes as many devices as can share its part.

    So fsdp takes those that divide the rows and n_embd, then data those that divide the
    rows.
    """
    shape = {axis: getattr(config.mesh, axis) for axis in AXES}
    rows, block_size = config.data.microbatch_size, config.model.block_size
    for axis, shared in (("fsdp", getattr(config.model, "n_embd", 0)), ("data", 0)):
        if shape[axis] == -1:
            taken = math.prod(size for size in shape.values() if size != -1)
            sharing = taken // shape["tensor"]
            shape[axis] = 1
            for n in range(2, devices // taken + 1):
                if rows % (sharing * n) == 0 and shared % (shape["tensor"] * n) == 0:
                    shape[axis] = n
    requested = " x ".join(f"mesh.{axis}={size}" for axis, size in shape.items())
    if math.prod(shape.values()) > devices:
        raise ValueError(f"{requested}, but there are {devices} devices")
    if rows % (shape["data"] * shape["fsdp"]):
        raise ValueError(
            f"{rows} sequences at once (batch_size / gradient_accumulation_steps) do "
            f"not divide over mesh.data={shape['data']} x mesh.fsdp={shape['fsdp']} "
            "devices; make them a multiple of it"
        )
    if block_size % shape["tensor"]:
        raise ValueError(
            f"block_size={block_size} does not divide over mesh.tensor="
            f"{shape['tensor']} devices; make it a multiple of it"
        )
    return tuple(shape.values())


def single_device_mesh(backend: str | None = None) -> Mesh:
    """A mesh of this process's first device alone."""
    return Mesh(np.reshape(jax.local_devices(backend=backend)[:1], (1, 1, 1)), AXES)


def host_mesh() -> Mesh:
    """A mesh of one device in the host's memory, which is the larger one."""
    try:
        return single_device_mesh("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return single_device_mesh()


def model_mesh(config: Config, mesh: MeshConfig) -> Mesh:
    """The devices that share one model, where there are no rows to share.

    Raises ValueError if `mesh.data` is not 1, and as `make_mesh` does.
    """
    if mesh.data != 1:
        raise ValueError(
            f"mesh.data={mesh.data} shares no work here; give mesh.fsdp or mesh.tensor"
        )
    rows = mesh.fsdp if mesh.fsdp > 0 else jax.device_count()
    data = dataclasses.replace(
        config.data, batch_size=rows, gradient_accumulation_steps=1
    )
    config = dataclasses.replace(config, data=data, mesh=mesh)
    return make_mesh(config, lambda line: None)


def data_parallel_mesh(
    model: ModelConfig, params: Any, rows: int, least: int
) -> Mesh | None:
    """The devices that share the rows of generation, each with all parameters.

    None where it would be one: where each is to have `least` rows, where devices share
    the parameters already, and for a large model on a CPU, which would hold it twice.
    """
    device, *others = jnp.asarray(jax.tree.leaves(params)[0]).devices()
    if others or prefers_one_device(device, model):
        return None
    devices = jax.local_devices(backend=device.platform)
    most = min(len(devices), rows // least)
    count = max((n for n in range(1, most + 1) if rows % n == 0), default=1)
    return Mesh(np.reshape(devices[:count], (-1, 1, 1)), AXES) if count > 1 else None


def with_shardings(shapes: Any, mesh: Mesh) -> Any:
    """The shapes of parameters or moments with their placements, by `shardings`."""
    where = shardings(shapes, mesh)
    return jax.tree.map(lambda leaf, at: leaf.update(sharding=at), shapes, where)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The placement of each parameter or moment of a tree, by the table of rules.

    Raises ValueError that names a parameter without a rule, or one with a dimension
    that does not divide over its devices. Scalars are held by every device.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fitting = (s for form, s in RULES if re.fullmatch(f"(.*/)?({form})", name))
        spec = next(fitting, None) if leaf.ndim else P()
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
                    + "; give fewer devices to that axis"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Placement of what every device holds in full."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Placement of batches, whose rows are along `axis`."""
    return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")))


@contextmanager
def activation_sharding(mesh: Mesh) -> Iterator[None]:
    """What is traced in this context cuts its activations as the mesh asks for."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATIONS):
        yield
