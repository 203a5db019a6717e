"""The train step: a pure function of the state and a batch.

B batch   T time   N steps in one call

A batch is inputs and targets, i32 [B, T].
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgpt import ops
from jaxgpt.config import Config, TrainConfig
from jaxgpt.parallel.defaults import train_options, with_microbatches
from jaxgpt.parallel.feeding import share_rows
from jaxgpt.parallel.mesh import (
    activations_over,
    over_rows,
    placed,
    replicated,
    shardings,
)
from jaxgpt.training.optimizer import learning_rate_schedule, make_optimizer

Batch = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]  # inputs and targets
Metrics = dict[str, jax.Array]
EvalStep = Callable[[Any, Batch], jax.Array]


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: completed updates, i32 scalar.
      params: the model's parameters, f32.
      opt_state: AdamW's moments and counts.
      skipped: updates left out, since their loss or gradients were not finite, i32
        scalar; `step` counts them too.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    skipped: jax.Array | np.int32 = np.int32(0)


def init_state(
    model: nn.Module, config: Config, seed: jax.Array | int | None = None
) -> TrainState:
    """The state before the first update, of `seed` (of `train.seed` if left out)."""
    init_key, _ = _keys(config, seed)
    tokens_BT = jnp.zeros((1, config.model.block_size), jnp.int32)
    return state_of(config, model.init(init_key, tokens_BT)["params"])


def state_of(config: Config, params: Any) -> TrainState:
    """The state before the first update of `params`."""
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero)


def create_state(
    model: nn.Module, config: Config, mesh: Mesh, params: Any = None
) -> TrainState:
    """`init_state`, or `state_of` the params where they are given, on the mesh."""
    if params is None:
        return init_on(mesh, model, config)()
    where = _shardings(abstract_state(model, config, mesh))
    return jax.jit(partial(state_of, config), out_shardings=where)(params)


def init_on(mesh: Mesh, model: nn.Module, config: Config) -> Any:
    """`init_state` as a jitted function that makes each part on its own device."""
    where = _shardings(abstract_state(model, config, mesh))
    return jax.jit(partial(init_state, model, config), out_shardings=where)


def _shardings(state: TrainState) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


@cache  # as a start asks for it several times
def abstract_state(model: nn.Module, config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its memory."""
    return placed(jax.eval_shape(partial(init_state, model, config)), mesh)


def _keys(config: Config, seed: jax.Array | int | None) -> jax.Array:
    """The keys of initialisation and of dropout."""
    return jax.random.split(jax.random.key(config.train.seed if seed is None else seed))


def make_train_step(
    model: nn.Module,
    config: Config,
    axis_name: str | None = None,
    seed: jax.Array | int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes `train_step(state, batch) -> state, metrics`: one update of AdamW.

    It is pure, and runs under `jit`, with or without shardings, as it is. Inside `pmap`
    or `shard_map` give the mapped axis's name: every device then sees its share of the
    rows, in order, and gradients are averaged over the axis.

    The batch is cut into `data.gradient_accumulation_steps` pieces, which run one after
    the other and whose gradients are averaged. Dropout depends on (seed, step, layer,
    row) only, so neither the cut nor the devices change it.

    `seed` stands in for `train.seed`, so that `vmap` can train with several at once.

    A step whose loss or gradient norm is not finite leaves parameters and moments as
    they are. After more than `train.max_skipped_steps` of them the state stays what it
    was before the last, whatever comes, so that the host may look at it at leisure.

    The metrics are scalars of the whole batch: `loss` (nats per token, before the
    update), `grad_norm` (before clipping), `learning_rate`, and `skipped`, the state's.
    """
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    schedule = learning_rate_schedule(config.optimizer, config.train.max_steps)
    pieces = config.data.pieces
    limit = config.train.max_skipped_steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss_fn = partial(training_loss, model, step_key(config, state.step, seed))
        params, rows_B = state.params, jnp.arange(len(batch[0]))
        if axis_name:
            rows_B += jax.lax.axis_index(axis_name) * len(rows_B)
            # Else shard_map sums the gradients of replicated parameters by itself.
            params = jax.lax.pcast(params, axis_name, to="varying")
        loss, grads = accumulate(
            jax.value_and_grad(loss_fn), params, (*batch, rows_B), pieces
        )
        if axis_name:
            loss, grads = jax.lax.pmean((loss, grads), axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        going_on = state.skipped <= limit
        skipped = state.skipped + (going_on & ~finite)
        params, opt_state = jax.tree.map(
            partial(jnp.where, going_on & finite),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "skipped": skipped,
        }
        step = state.step + (skipped <= limit)
        return TrainState(step, params, opt_state, skipped), metrics

    return train_step


def check_skipped(state: TrainState, config: Config) -> None:
    """Raises ValueError if the state has skipped more steps than it may."""
    skipped, limit = int(state.skipped), config.train.max_skipped_steps
    if skipped > limit:
        raise ValueError(
            f"the run has skipped {skipped} steps that were not finite, more than "
            f"--train.max-skipped-steps {limit}; give a higher one"
        )


def step_key(
    config: Config, step: jax.Array | int, seed: jax.Array | int | None = None
) -> jax.Array:
    """The key of the dropout of the update after `step` updates."""
    _, dropout_key = _keys(config, seed)
    return jax.random.fold_in(dropout_key, step)


def training_loss(
    model: nn.Module,
    key: jax.Array,
    params: Any,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    rows_B: jax.Array,
) -> jax.Array:
    """The mean loss with dropout, in nats, f32 scalar.

    Args:
      model: any of `build_model`'s.
      key: as `step_key` gives it.
      params: the model's.
      inputs_BT: token ids, i32.
      targets_BT: token ids, i32.
      rows_B: numbers of the rows in the whole batch, which key their dropout masks.
    """
    apply = partial(
        model.apply,
        {"params": params},
        inputs_BT,
        deterministic=False,
        rows_B=rows_B,
        rngs={"dropout": key},
    )
    if hasattr(model, "hidden"):
        head = model.head(params)
        return ops.mean_head_loss(
            apply(method="hidden"), head, targets_BT, model.platform
        )
    return ops.cross_entropy(apply(), targets_BT).mean()


def accumulate(
    loss_and_grads: Callable[..., Any], params: Any, rows: Any, pieces: int
) -> Any:
    """Averages `loss_and_grads(params, *rows)` over `pieces` equal parts of the rows.

    Each part takes rows from all over the batch, so that a batch sharded over devices
    stays where it is.
    """
    if pieces == 1:
        return loss_and_grads(params, *rows)
    parts = jax.tree.map(
        lambda a: a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1), rows
    )

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, loss_and_grads(params, *part)), None

    no_grads = jax.tree.map(jnp.zeros_like, params)
    no_loss = jnp.zeros_like(jax.tree.leaves(params)[0], shape=())  # mapped as they are
    total, _ = jax.lax.scan(add, (no_loss, no_grads), parts)
    return jax.tree.map(lambda a: a / pieces, total)


def call_size(step: int, config: TrainConfig) -> int:
    """Updates in the next call: steps_per_call, or 1 where that would run past a date.

    So two programs serve all intervals, and no call runs past something that is due.
    """
    intervals = (config.eval_interval, config.checkpoint_interval)
    due = min(step - step % interval + interval for interval in intervals)
    fits = step + config.steps_per_call <= min(due, config.max_steps)
    return config.steps_per_call if fits else 1


def compile_train_steps(
    model: nn.Module, config: Config, mesh: Mesh, count: int
) -> jax.stages.Compiled:
    """Compiles `train_step` for `count` batches (N) in one dispatch.

    Returns `train_steps(state, batches) -> state, metrics`, with batches i32 [N, B, T]
    and metrics [N]. It takes over the memory of the state it is given.
    """
    return trace_train_steps(model, config, mesh, count).lower().compile()


def trace_train_steps(
    model: nn.Module, config: Config, mesh: Mesh, count: int
) -> jax.stages.Traced:
    """What `compile_train_steps` compiles; the mesh's devices need not be here."""
    train_steps, arguments = jit_train_steps(model, config, mesh, count)
    with activations_over(mesh):
        return train_steps.trace(*arguments)


def jit_train_steps(
    model: nn.Module, config: Config, mesh: Mesh, count: int
) -> tuple[Any, Any]:
    """The jitted function that is traced, and the shapes of its arguments."""
    train_step = make_train_step(model, with_microbatches(config, mesh))
    state = abstract_state(model, config, mesh)
    train_steps = jax.jit(
        lambda state, batches: jax.lax.scan(train_step, state, batches),
        out_shardings=(_shardings(state), replicated(mesh)),
        **train_options(config, mesh),
    )
    shape = (count, config.data.batch_size, config.model.block_size)
    rows = over_rows(mesh, axis=1)
    tokens_NBT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    return train_steps, (state, (tokens_NBT, tokens_NBT))


def compile_eval_step(model: nn.Module, mesh: Mesh) -> EvalStep:
    """Makes `eval_step(params, batch) -> losses_BT` in nats, f32, without dropout.

    Every process gives the whole batch, and gets all its losses.
    """

    def losses(params: Any, batch: Batch) -> jax.Array:
        (inputs_BT, targets_BT), apply = batch, partial(model.apply, {"params": params})
        if hasattr(model, "hidden"):
            x_BTC, head = apply(inputs_BT, method="hidden"), model.head(params)
            return ops.head_losses(x_BTC, head, targets_BT, model.platform)
        return ops.cross_entropy(apply(inputs_BT), targets_BT)

    jitted = jax.jit(losses, out_shardings=replicated(mesh))

    def eval_step(params: Any, batch: Batch) -> jax.Array:
        params = jax.device_put(params, shardings(params, mesh))  # if need be
        with activations_over(mesh):
            return jitted(params, jax.tree.map(partial(share_rows, mesh), batch))

    return eval_step
