"""The train step: a pure function of the state and a batch.

B batch   N steps in one dispatch
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from operator import attrgetter
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.exits import in_background
from jaxgpt.models import input_shapes
from jaxgpt.parallel.defaults import train_jit_options, with_microbatches
from jaxgpt.parallel.mesh import activation_sharding, replicated, with_shardings
from jaxgpt.training.objectives import Batch, Context, LossSum, Objective
from jaxgpt.training.optimizer import Optimizer, run_optimizer


@flax.struct.dataclass
class TrainState:
    """The state of training.

    Attributes:
      step: completed updates, i32 scalar.
      params: the model's parameters, f32.
      opt_state: AdamW's moments and counts.
      skipped: updates skipped because loss or gradients were not finite, i32 scalar;
        they are included in `step`.
      extra: what else changes: of PPO the value head and beta; None otherwise.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    skipped: jax.Array | np.int32 = np.int32(0)
    extra: Any = None


def _keys(config: Config, seed: jax.Array | int | None = None) -> jax.Array:
    """The keys for initialisation and dropout."""
    return jax.random.split(jax.random.key(config.train.seed if seed is None else seed))


def _initial_state(model: nn.Module, config: Config, params: Any = None) -> TrainState:
    shapes = input_shapes(config.model, config.model.block_size)
    inputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    initial = model.init(_keys(config)[0], **inputs)["params"]
    params = dict(initial) | dict(params or {})
    trained, extra = params, None
    if config.ppo:
        value = {
            "kernel": jnp.zeros(getattr(config.model, "n_embd", 0)),
            "bias": jnp.zeros(()),
        }
        trained = {"policy": params, "value": value}
        extra = {"value": value, "beta": jnp.float32(config.ppo.beta)}
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, run_optimizer(config).init(trained), zero, extra)


@cache  # because it is needed several times at startup
def abstract_state(model: nn.Module, config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating memory."""
    return with_shardings(jax.eval_shape(partial(_initial_state, model, config)), mesh)


def create_state(
    model: nn.Module, config: Config, mesh: Mesh, params: Any = None
) -> TrainState:
    """The state before the first update, from `train.seed` or the given parameters.

    Each device computes its own shard.
    """
    where = jax.tree.map(attrgetter("sharding"), abstract_state(model, config, mesh))
    return jax.jit(partial(_initial_state, model, config), out_shardings=where)(params)


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    config: Config,
    axis_name: str | None = None,
    seed: jax.Array | int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes `train_step(state, batch) -> state, metrics`, which does one update.

    The function is pure and runs under `jit`, with or without shardings. Inside `pmap`
    or `shard_map`, pass the name of the mapped axis; each device must then have its
    shard of the rows, in order.

    The batch is split into `data.gradient_accumulation_steps` microbatches that run one
    after another. Gradients and metrics are summed over microbatches and devices, then
    divided once by their total weight. Dropout depends only on (seed, step, layer,
    row), not on how the batch is split.

    If the loss or gradient norm is not finite, the step is skipped: parameters and
    moments stay unchanged, as they do if the batch has weight 0. Once more than
    `train.max_skipped_steps` steps are skipped, later steps change nothing, so that the
    host can still inspect the state before the last skipped step.

    The metrics are scalars of the whole batch: `loss` (before the update) and the
    objective's other metrics, which are weighted means; `tokens`, the objective's or
    else the weight of the loss; `grad_norm` (before clipping), `learning_rate`, and the
    state's `skipped`.

    Args:
      objective: the objective to minimise.
      optimizer: the result of `run_optimizer`.
      config: only its sections `data` and `train` are read.
      axis_name: the mapped axis of `pmap` or `shard_map`, if any.
      seed: replaces `train.seed`, so that `vmap` can train with several seeds at once.
    """
    limit = config.train.max_skipped_steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        key, params = dropout_key(config, state.step, seed), state.params
        rows_B = jnp.arange(len(jax.tree.leaves(batch)[0]))
        if axis_name:
            rows_B += jax.lax.axis_index(axis_name) * len(rows_B)
            # Otherwise shard_map itself sums the gradients of replicated parameters.
            params = jax.lax.pcast(params, axis_name, to="varying")
        grads, loss, reported = sum_gradients(
            objective, key, params, batch, rows_B, config.data.microbatches, axis_name
        )
        weighted = loss.weight > 0
        grads = jax.tree.map(lambda g: g / jnp.where(weighted, loss.weight, 1), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(grad_norm)
        active = state.skipped <= limit
        skipped = state.skipped + (active & weighted & ~finite)
        params, opt_state = jax.tree.map(
            partial(jnp.where, active & finite & weighted),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        tokens = reported.pop("tokens", LossSum(loss.weight, loss.weight)).total
        metrics = {
            "loss": loss.mean(),
            **{name: metric.mean() for name, metric in reported.items()},
            "tokens": tokens,
            "grad_norm": grad_norm,
            "learning_rate": optimizer.learning_rate(state.opt_state),
            "skipped": skipped,
        }
        step = state.step + (skipped <= limit)
        return TrainState(step, params, opt_state, skipped, state.extra), metrics

    return train_step


def dropout_key(
    config: Config, step: jax.Array | int, seed: jax.Array | int | None = None
) -> jax.Array:
    """The dropout key of the update after `step` updates."""
    _, key = _keys(config, seed)
    return jax.random.fold_in(key, step)


def sum_gradients(
    objective: Objective,
    key: jax.Array,
    params: Any,
    batch: Batch,
    rows_B: jax.Array,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> tuple[Any, LossSum, dict[str, LossSum]]:
    """Gradients, loss and metrics of the whole batch, summed and not yet divided.

    Microbatches are strided slices of the batch, so that a sharded batch does not move
    between devices.
    """

    def losses(params: Any, batch: Batch, rows_B: jax.Array) -> tuple[jax.Array, Any]:
        loss, metrics = objective(params, batch, Context(key, rows_B))
        return loss.total, (loss, metrics)

    def sums(batch: Batch, rows_B: jax.Array) -> tuple[Any, Any]:
        return jax.grad(losses, has_aux=True)(params, batch, rows_B)

    total: Any
    if microbatches == 1:
        total = sums(batch, rows_B)
    else:
        parts = jax.tree.map(
            lambda a: a.reshape(-1, microbatches, *a.shape[1:]).swapaxes(0, 1),
            (batch, rows_B),
        )
        first = jax.tree.map(lambda a: a[0], parts)
        _, reported = jax.eval_shape(losses, params, *first)
        zero_sums = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), reported)
        if axis_name:
            zero_sums = jax.lax.pcast(zero_sums, axis_name, to="varying")
        zeros = jax.tree.map(jnp.zeros_like, params), zero_sums

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, sums(*part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
    if axis_name:
        total = jax.lax.psum(total, axis_name)
    grads, (loss, metrics) = total
    return grads, loss, metrics


def check_skipped(state: TrainState, config: Config) -> None:
    """Raises ValueError if the state has more skipped steps than the config allows."""
    skipped, limit = int(state.skipped), config.train.max_skipped_steps
    if skipped > limit:
        raise ValueError(
            f"the run has skipped {skipped} steps that were not finite, more than "
            f"--train.max-skipped-steps {limit}; increase it"
        )


def trace_train_steps(
    objective: Objective, config: Config, mesh: Mesh, state: TrainState, batches: Batch
) -> jax.stages.Traced:
    """Traces several train steps as one program; the devices need not be present.

    Lowered and compiled, it is `train_steps(state, batches) -> state, metrics`, with
    metrics [N]. It donates the buffers of the state.

    Args:
      objective: the objective to minimise.
      config: the run's config.
      mesh: the run's mesh.
      state: the result of `abstract_state` or `create_state`.
      batches: leaves [N, B, ...], or their shapes and shardings.
    """
    train_step = make_train_step(
        objective, run_optimizer(config), with_microbatches(config, mesh)
    )

    def train_steps(state: TrainState, batches: Batch) -> tuple[TrainState, Any]:
        return jax.lax.scan(train_step, state, batches)

    jitted = jax.jit(
        train_steps,
        out_shardings=(jax.tree.map(attrgetter("sharding"), state), replicated(mesh)),
        **train_jit_options(config, mesh),
    )
    with activation_sharding(mesh):
        return jitted.trace(state, batches)


def make_train_program(
    objective: Objective, config: Config, mesh: Mesh, state: TrainState
) -> Callable[[Batch], Future[jax.stages.Compiled]]:
    """Makes a function that compiles the train steps for the shapes of `batches`.

    It compiles in the background, so that other programs can compile and run meanwhile,
    and only once for the same shapes. The arguments are those of `trace_train_steps`.
    """
    programs: dict[Any, Future[jax.stages.Compiled]] = {}

    def train_program(batches: Batch) -> Future[jax.stages.Compiled]:
        shapes = tuple(map(jax.typeof, jax.tree.leaves(batches)))
        if shapes not in programs:
            trace = partial(trace_train_steps, objective, config, mesh, state, batches)
            programs[shapes] = in_background(lambda: trace().lower().compile())
        return programs[shapes]

    return train_program
