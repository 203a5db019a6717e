"""A second objective, of which every device and every microbatch counts another part.

B batch   T time
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, changed
from jax.sharding import PartitionSpec as P

from jaxgpt import ops
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.training.objectives import LossSum
from jaxgpt.training.optimizer import Optimizer, make_optimizer
from jaxgpt.training.step import (
    TrainState,
    create_state,
    make_train_step,
    trace_train_steps,
)

B, T = 16, TINY.model.block_size
CONFIG = changed(
    TINY, model={"architecture": "bigram"}, data={"batch_size": B}, mesh={"data": 8}
)
MODEL = build_model(CONFIG.model, "cpu")
SGD = Optimizer(*optax.sgd(1.0), learning_rate=lambda state: jnp.float32(1))


def objective(params, batch, context):
    """The loss and the accuracy of some of the tokens, and the mean number of rows."""
    logits_BTV = MODEL.apply({"params": params}, batch["tokens"][:, :-1])
    targets_BT, counts_BT = batch["tokens"][:, 1:], batch["counts"]
    losses_BT = ops.cross_entropy(logits_BTV, targets_BT)
    right_BT = logits_BTV.argmax(axis=-1) == targets_BT
    weight = counts_BT.sum()
    return LossSum((losses_BT * counts_BT).sum(), weight), {
        "accuracy": LossSum((right_BT * counts_BT).sum(dtype=jnp.float32), weight),
        "row": LossSum(
            context.rows_B.sum(dtype=jnp.float32), jnp.float32(len(context.rows_B))
        ),
    }


def batch(counted_of_row):
    """Random tokens, of which so many of each row count."""
    tokens = np.random.default_rng(0).integers(11, size=(B, T + 1)).astype(np.int32)
    counts = np.arange(T) < np.array(counted_of_row)[:, None]
    return {"tokens": tokens, "counts": counts.astype(np.float32)}


BATCH = batch([row % (T + 1) for row in range(B)])


def start(optimizer=SGD):
    params = create_state(MODEL, CONFIG, make_mesh(CONFIG)).params
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero)


def with_microbatches(microbatches):
    return changed(CONFIG, data={"gradient_accumulation_steps": microbatches})


def under_jit(microbatches):
    traced = jax.jit(make_train_step(objective, SGD, with_microbatches(microbatches)))
    return traced(start(), BATCH)


def on_8_devices(microbatches):
    config, state = (
        with_microbatches(microbatches),
        create_state(MODEL, CONFIG, make_mesh(CONFIG)),
    )
    stacked = jax.tree.map(lambda a: a[None], BATCH)
    mesh = make_mesh(config)
    batches = jax.device_put(stacked, jax.NamedSharding(mesh, P(None, "data")))
    traced = trace_train_steps(objective, config, mesh, state, batches)
    state, metrics = traced.lower().compile()(state, batches)
    return state, jax.tree.map(lambda a: a[0], metrics)


def in_shard_map(microbatches):
    step = make_train_step(
        objective, SGD, with_microbatches(microbatches), axis_name="data"
    )
    sharded = jax.shard_map(
        step,
        mesh=make_mesh(CONFIG),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return jax.jit(sharded)(start(), BATCH)


def in_pmap(microbatches):
    step = make_train_step(
        objective, SGD, with_microbatches(microbatches), axis_name="data"
    )
    shards = jax.tree.map(lambda a: a.reshape(8, B // 8, *a.shape[1:]), BATCH)
    copies = jax.tree.map(lambda a: np.stack([a] * 8), start())
    out = jax.pmap(step, axis_name="data")(copies, shards)
    return jax.tree.map(lambda a: a[3], out)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("run", [under_jit, in_shard_map, in_pmap])
def test_loss_gradients_and_figures_are_means_over_what_counts(run, microbatches):
    before = start().params
    state, metrics = run(microbatches)
    counted = BATCH["counts"] > 0

    def mean_loss(params):
        logits = MODEL.apply({"params": params}, BATCH["tokens"][:, :-1])
        losses = ops.cross_entropy(logits, BATCH["tokens"][:, 1:])
        return losses[counted].mean(), logits

    (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(before)
    right = (logits.argmax(axis=-1) == BATCH["tokens"][:, 1:])[counted].mean()
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(float(right), rel=1e-6)
    assert metrics["row"] == pytest.approx((B - 1) / 2)
    assert metrics["tokens"] == counted.sum()
    norm = float(optax.tree.norm(grads))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    jax.tree.map(
        lambda b, a, g: np.testing.assert_allclose(b - a, g, atol=1e-6),
        before,
        state.params,
        grads,
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_compiled_for_8_devices_it_trains_as_on_one(microbatches):
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.train.max_steps)
    alone = jax.jit(make_train_step(objective, optimizer, CONFIG))
    one, of_one = alone(start(optimizer), BATCH)
    eight, of_eight = on_8_devices(microbatches)
    for ours, theirs in ((one, eight), (of_one, of_eight)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            ours,
            theirs,
        )


def test_where_nothing_counts_parameters_and_moments_stay_and_no_step_is_skipped():
    optimizer = make_optimizer(CONFIG.optimizer, CONFIG.train.max_steps)
    step = jax.jit(make_train_step(objective, optimizer, CONFIG))
    before, first = step(start(optimizer), BATCH)
    after, metrics = step(before, batch([0] * B))
    assert (after.step, after.skipped) == (before.step + 1, 0)
    assert metrics["tokens"] == 0
    assert np.isnan(metrics["loss"])
    jax.tree.map(
        np.testing.assert_array_equal,
        (before.params, before.opt_state),
        (after.params, after.opt_state),
    )
    _, later = step(after, BATCH)
    assert later["learning_rate"] == metrics["learning_rate"]  # as no step was taken
    assert later["learning_rate"] > first["learning_rate"]
