"""Defaults that depend on the device, where no one setting is fast on all of them."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.config import Config, ModelConfig, TrainConfig
from jaxgpt.models import parameter_shapes
from jaxgpt.start import float32_matmul_flags

# Tokens in a microbatch of each CPU device, sized so that activations fit the cache: on
# 2 cores the 10.8M model trains 1.5 times as fast as with all 8192 at once.
CACHED_TOKENS = 1024

# Rough lower bounds of the FLOP/s that a device reaches, only to size dispatches.
CPU_FLOPS, ACCELERATOR_FLOPS = 5e10, 1e14


def platform_of(device: Any) -> str:
    """The platform that programs for the device are compiled for, as in `jaxgpt.ops`.

    Args:
      device: a `jax.Device`, or a mesh of devices of one kind.
    """
    if isinstance(device, Mesh):
        device = device.devices.flat[0]
    if device.platform in ("cpu", "tpu"):
        return device.platform
    nvidia = device.device_kind.startswith("NVIDIA")
    # cuDNN's attention needs Ampere, which has compute capability 8.0, or newer.
    return "cuda" if nvidia and float(device.compute_capability) >= 8 else "gpu"


def default_preset() -> str:
    """Name of the Tiny Shakespeare preset for JAX's default backend."""
    return "shakespeare-char" + ("-cpu" if jax.default_backend() == "cpu" else "")


def prefers_one_device(device: jax.Device, model: ModelConfig) -> bool:
    """Whether the model is too large to replicate on CPU devices, which share memory.

    On 2 cores, a step of GPT-2's blocks (85M) with 2 rows of 512 took 2.7 s and 4.3 GB
    on one device, 3.0 s and 6.2 GB on two.
    """
    return device.platform == "cpu" and _parameters(model) > 50e6


def _parameters(model: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model)))


def with_microbatches(config: Config, mesh: Mesh) -> Config:
    """Replaces gradient_accumulation_steps=-1 by the default for the mesh's devices."""
    data, microbatches = config.data, config.data.microbatches
    if data.gradient_accumulation_steps == -1 and platform_of(mesh) == "cpu":
        rows = data.batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
        max_rows = max(1, CACHED_TOKENS // config.model.block_size)
        divisors = (n for n in range(1, rows + 1) if rows % n == 0)
        microbatches = next(n for n in divisors if rows // n <= max_rows)
    data = dataclasses.replace(data, gradient_accumulation_steps=microbatches)
    return dataclasses.replace(config, data=data)


def steps_in_next_call(step: int, config: TrainConfig) -> int:
    """Updates in the next dispatch: steps_per_call, or 1 if that passes a boundary.

    Boundaries are evaluations, checkpoints and max_steps. At most two programs compile
    for each length of batches.
    """
    intervals = (config.eval_interval, config.checkpoint_interval)
    due = min(step - step % interval + interval for interval in intervals)
    fits = step + config.steps_per_call <= min(due, config.max_steps)
    return config.steps_per_call if fits else 1


def with_steps_per_call(config: Config, mesh: Mesh) -> Config:
    """Replaces steps_per_call=-1 by the default for the mesh's devices.

    A dispatch is then about a second of work, so that the host never paces the devices,
    and progress and interrupts are not late. All dispatches have the same size, so that
    one program serves: it divides the intervals of evaluations and checkpoints, and
    max_steps too if it thereby stays above half. If that would be less than a tenth of
    a second, it divides only the shorter interval, and single updates fill the other.
    """
    train = config.train
    if config.rewarded:  # phases of an iteration are programs of their own
        return dataclasses.replace(
            config, train=dataclasses.replace(train, steps_per_call=1)
        )
    if train.steps_per_call != -1:
        return config
    # A dispatch of examples is padded to its longest batch, so it has fewer.
    is_padded = config.model.task != "next-token" or config.dpo
    seconds = 0.1 if is_padded else 1.0
    # The backward pass takes twice the operations of the forward pass.
    most = _batches_within(seconds, config.data.batch_size, 6, config, mesh)
    intervals = (train.eval_interval, train.checkpoint_interval)
    boundary = math.gcd(*(each for each in intervals if each < train.max_steps))

    def largest_divisor(number: int) -> int:
        most_steps = min(most, train.max_steps)
        return max(n for n in range(1, most_steps + 1) if number % n == 0)

    count = largest_divisor(boundary)
    if 2 * (even := largest_divisor(math.gcd(boundary, train.max_steps))) > count:
        count = even
    if 10 * count < most:
        count = largest_divisor(min(*intervals, train.max_steps))
    return dataclasses.replace(
        config, train=dataclasses.replace(train, steps_per_call=count)
    )


def evaluations_per_call(config: Config, mesh: Mesh, total: int) -> int:
    """Batches per dispatch of an evaluation of `total` batches of a microbatch's rows.

    At most about half a second of work, and at least half of that. Of these sizes, it
    leaves the fewest places of the last dispatch empty.
    """
    rows = config.data.microbatch_size
    most = min(_batches_within(0.5, rows, 2, config, mesh), total)
    return min(range(most, most // 2, -1), key=lambda size: -total % size)


def _batches_within(
    seconds: float, rows: int, flops: int, config: Config, mesh: Mesh
) -> int:
    """How many batches take at most `seconds`, from 1 to 100, roughly.

    Args:
      rows: in each batch.
      flops: per parameter and token.
    """
    rate = CPU_FLOPS if platform_of(mesh) == "cpu" else ACCELERATOR_FLOPS
    flops *= _parameters(config.model) * rows * config.model.block_size
    return max(1, min(100, int(seconds * rate * mesh.size / flops)))


def train_jit_options(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Arguments of `jax.jit` for the train steps of any objective."""
    float32 = getattr(config.model, "compute_dtype", "float32") == "float32"
    options = float32_matmul_flags() if float32 and platform_of(mesh) == "cpu" else None
    return {"donate_argnums": 0, "compiler_options": options}
