"""The cost of a training step, from compiling it for present or absent devices."""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.feeding import batch_shapes
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning.flops import product_flops, step_flops
from jaxgpt.planning.hlo import collectives
from jaxgpt.terminal import log_line
from jaxgpt.text.corpus import known_vocab_size, load_corpus
from jaxgpt.text.labelled import known_labels
from jaxgpt.text.tasks import kind_of
from jaxgpt.training.objectives import make_objective
from jaxgpt.training.step import abstract_state, trace_train_steps

Rows = Iterator[tuple[str, str]]  # names and values


@dataclass(frozen=True)
class Chip:
    """Published figures of a chip, or of each device if JAX sees several in a chip."""

    flops: float  # bfloat16 operations per second
    hbm: int  # bytes of memory
    ici_bandwidth: float  # bytes per second received from other chips


# By `jax.Device.device_kind`. Sources: docs.cloud.google.com/tpu/docs/ v4, v5e, v5p,
# v6e and tpu7x, whose interconnect figures count both directions; for the interconnect
# of v4, Jouppi et al. 2023, "TPU v4", table 4: 6 links of 50 GB/s.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * 2**30, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 400e9 / 2),
    "TPU v5": Chip(459e12, 95 * 2**30, 1200e9 / 2),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 800e9 / 2),
    "TPU7x": Chip(2307e12 / 2, 192 * 2**30 // 2, 1200e9 / 2 / 2),  # 2 devices per chip
}
USABLE = 0.98  # fraction of memory; the runtime keeps the rest (v5e: 0.25 of 16 GiB)


def tpu_devices(topology: str) -> list[jax.Device]:
    """The chips of a TPU topology such as "v5e:2x4", for ahead-of-time compilation.

    Raises ImportError without libtpu, ValueError if it does not know the topology.
    """
    if not find_spec("libtpu"):
        raise ImportError(
            "--plan needs the TPU compiler, which runs on x86-64 Linux; install it "
            "with `pip install -r requirements-plan.txt`"
        )
    # Lets several processes on this machine compile at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    try:
        options: dict[str, Any] = {}
        if set(topology.partition(":")[2].split("x")) == {"1"}:  # a single chip
            options["chips_per_host_bounds"] = (1, 1, 1)
        if topology.startswith("v4"):  # its two cores form one device
            options["chip_config_name"] = "megacore"
        description = topologies.get_topology_desc(topology, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"{topology!r} is not a TPU topology that libtpu knows; examples are "
            f"v5e:2x4, v5p:2x2x2, v6e:4x4. It says: {error}"
        ) from error
    return description.devices


@contextmanager
def no_compilation_cache() -> Iterator[None]:
    """Disables the compilation cache, which can't load programs for absent chips."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def describe(config: Config, topology: str = "") -> Iterator[str]:
    """Yields lines that report the cost of a run; compiles the step, runs nothing.

    The cost is of the longest batches: texts of unequal lengths count as padded to
    block_size.

    Needs no corpus if `model.vocab_size` is given or the corpus is known by name.

    Args:
      topology: TPU chips to plan for, present or not; this machine's devices if empty.

    Raises ValueError if the step does not fit in the chips' memory.
    """
    if config.rewarded:
        raise ValueError(
            "the cost of PPO and GRPO depends on how long the responses get; train for "
            "a few steps, and see the rows of metrics.jsonl"
        )
    known: dict[str, Any] = {}
    if config.model.vocab_size is None:
        known["vocab_size"] = known_vocab_size(config)
    if not getattr(config.model, "labels", True):
        known["labels"] = known_labels(config.data)
    if all(known.values()):
        config = replace(config, model=replace(config.model, **known))
    else:
        config = load_corpus(config, log_line)[1]
    for name, value in _rows(config, topology):
        yield f"{name:19}{value}"


def _rows(config: Config, topology: str) -> Rows:
    devices = tpu_devices(topology) if topology else jax.devices()
    mesh = make_mesh(config, log_line, devices)
    model = build_model(config.model, platform_of(mesh))
    state = abstract_state(model, config, mesh)
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    tokens = _tokens_per_step(config)
    all_tokens = tokens * config.train.max_steps
    most = "" if kind_of(config) in ("next-token", "conversations") else "at most "
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    yield "parameters", f"{params:,}"
    yield "tokens per step", f"{most}{tokens:,}"
    per_parameter = f"({all_tokens / params:.1f} per parameter)"
    yield "total tokens", f"{most}{all_tokens:,} {per_parameter}"
    yield "FLOPs per step", f"{step_flops(config):.3g}"
    yield "devices", f"{mesh.size} x {devices[0].device_kind} ({axes})"
    for name, part in (
        ("parameter memory", state.params),
        ("optimizer state", state.opt_state),
    ):
        yield name, f"{_format_bytes(_bytes_per_device(part))} per device"

    batches = batch_shapes(config, mesh, 1)
    objective = make_objective(model, config.dpo)
    traced = trace_train_steps(objective, config, mesh, state, batches)
    compiled = _compile(traced, topology) if topology else traced.lower().compile()
    memory = compiled.memory_analysis()
    if memory is not None:  # None on some backends
        temporary = _format_bytes(memory.temp_size_in_bytes)
        yield "temporary memory", f"{temporary} per device"
    if topology:
        yield from _tpu_rows(config, topology, mesh, traced, compiled)


def _compile(traced: jax.stages.Traced, topology: str) -> jax.stages.Compiled:
    try:
        with no_compilation_cache():
            return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(r"\((\S+)\) exceeds available HBM \((\S+)\)", str(error))
        if not sizes:
            raise
        raise _does_not_fit(topology, sizes[1], sizes[2]) from error


def _does_not_fit(topology: str, needed: str, capacity: str) -> ValueError:
    return ValueError(
        f"the step does not fit {topology}: {needed} needed per device, {capacity} "
        "available; use more chips, --mesh.fsdp -1, --model.remat or more "
        "--data.gradient-accumulation-steps"
    )


def _tpu_rows(
    config: Config,
    topology: str,
    mesh: Mesh,
    traced: jax.stages.Traced,
    compiled: jax.stages.Compiled,
) -> Rows:
    """Yields memory, collectives by kind, and a lower bound on the step time.

    The bound follows from the chip's published figures. It counts matmuls and transfers
    between devices, but no memory traffic: a step limited by HBM takes longer. A model
    without matmuls has no bound. Utilisation can exceed 100%, since it counts masked
    scores, some of which blocked attention skips.

    Source: Williams et al. 2009, "Roofline: an insightful visual performance model",
    with the interconnect (ICI) in place of memory.
    """
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text()
    assert text is not None, "libtpu always returns HLO"
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    if chip and used > USABLE * chip.hbm:
        usable = _format_bytes(USABLE * chip.hbm)
        raise _does_not_fit(topology, _format_bytes(used), usable)
    capacity = f" of {_format_bytes(chip.hbm)}" if chip else ""
    yield "total memory", f"{_format_bytes(used)}{capacity} per device: it fits"
    matmul_flops, transfers = product_flops(traced.jaxpr), collectives(text)
    yield "FLOPs with remat", f"{matmul_flops:.3g}"
    for kind in sorted({each.kind for each in transfers}):
        of_kind = [each for each in transfers if each.kind == kind]
        n = sum(each.times for each in of_kind)
        total = _format_bytes(sum(each.times * each.tensor_bytes for each in of_kind))
        received = _format_bytes(sum(each.received_bytes for each in of_kind))
        yield kind, f"{n:,} per step, {total} in all; each device receives {received}"
    if not chip:
        return
    compute = matmul_flops / mesh.size / chip.flops
    ici = sum(each.received_bytes for each in transfers) / chip.ici_bandwidth
    yield "compute time", f"{compute:.3g} s"
    yield "ICI time", f"{ici:.3g} s"
    if step := max(compute, ici):
        tokens = _tokens_per_step(config)
        bound = f"{step:.3g} s: at most {tokens / step:,.0f} tokens/s"
        useful = step_flops(config) / mesh.size / chip.flops / step
        yield "roofline step time", f"{bound}, model FLOPs utilisation {useful:.0%}"


def _tokens_per_step(config: Config) -> int:
    """Tokens that the model reads in an update, if no row has padding."""
    sides = 2 if kind_of(config) in ("translation", "preferences") else 1
    return sides * config.data.batch_size * config.model.block_size


def _bytes_per_device(tree: object) -> int:
    """Bytes of a tree of sharded shapes that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _format_bytes(count: float) -> str:
    """Formats a number of bytes in MiB or GiB."""
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
