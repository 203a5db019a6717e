"""An objective of which every device and every microbatch has a different weight.

B batch   T time
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, changed, mesh_of
from jax.sharding import PartitionSpec as P

from jaxgpt import ops
from jaxgpt.config import ClassifierConfig, MaskedLMConfig, Seq2SeqConfig
from jaxgpt.models import build_model
from jaxgpt.text.examples import (
    LabelledTexts,
    MaskedTexts,
    Sequences,
    TextPairs,
    bucketed_source,
)
from jaxgpt.training.objectives import LossSum, make_objective
from jaxgpt.training.optimizer import Optimizer, make_optimizer
from jaxgpt.training.step import create_state, make_train_step, trace_train_steps

B, T = 16, TINY.model.block_size
CONFIG = changed(
    TINY, model={"architecture": "bigram"}, data={"batch_size": B}, mesh={"data": 8}
)
CONFIGS = [CONFIG, changed(CONFIG, data={"gradient_accumulation_steps": 2})]
MESH, MODEL = mesh_of(CONFIG), build_model(CONFIG.model, "cpu")
SGD = Optimizer(*optax.sgd(1.0), learning_rate=lambda state: jnp.float32(1))
ADAMW = make_optimizer(CONFIG.optimizer, CONFIG.train.max_steps)


def objective(params, batch, context):
    """The loss and the accuracy of some of the tokens, and the mean row index."""
    logits_BTV = MODEL.apply({"params": params}, batch["tokens"][:, :-1])
    targets_BT, counts_BT = batch["tokens"][:, 1:], batch["counts"]
    losses_BT = ops.cross_entropy(logits_BTV, targets_BT)
    right_BT = logits_BTV.argmax(axis=-1) == targets_BT
    rows_B, weight = context.rows_B, counts_BT.sum()
    return LossSum((losses_BT * counts_BT).sum(), weight), {
        "accuracy": LossSum((right_BT * counts_BT).sum(dtype=jnp.float32), weight),
        "row": LossSum(rows_B.sum(dtype=jnp.float32), jnp.float32(len(rows_B))),
    }


def make_batch(counts):
    """Random tokens; in each row, the first `counts[row]` targets have weight 1."""
    tokens = np.random.default_rng(0).integers(11, size=(B, T + 1)).astype(np.int32)
    weights = np.arange(T) < np.array(counts)[:, None]
    return {"tokens": tokens, "counts": weights.astype(np.float32)}


BATCH = make_batch([row % (T + 1) for row in range(B)])


@pytest.fixture(scope="module")
def initial():
    """The state before training with AdamW."""
    return jax.device_get(create_state(MODEL, CONFIG, MESH))


def under_jit(step, state, batch=BATCH):
    return jax.jit(step)(state, batch)


def in_shard_map(step, state, batch=BATCH):
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=MESH, **specs))(state, batch)


def in_pmap(step, state, batch=BATCH):
    shards = jax.tree.map(lambda a: a.reshape(8, B // 8, *a.shape[1:]), batch)
    copies = jax.tree.map(lambda a: np.stack([a] * 8), state)
    out = jax.pmap(step, axis_name="data")(copies, shards)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, [a[0]] * 8), out)
    return jax.tree.map(lambda a: a[3], out)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("run", [under_jit, in_shard_map, in_pmap])
def test_loss_gradients_and_metrics_are_weighted_means(initial, run, config):
    axis_name = None if run is under_jit else "data"
    step = make_train_step(objective, SGD, config, axis_name)
    params = initial.params
    state, metrics = run(step, initial.replace(opt_state=SGD.init(params)))
    counted = BATCH["counts"] > 0

    def mean_loss(params):
        logits = MODEL.apply({"params": params}, BATCH["tokens"][:, :-1])
        losses = ops.cross_entropy(logits, BATCH["tokens"][:, 1:])
        return losses[counted].mean(), logits

    (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    right = (logits.argmax(axis=-1) == BATCH["tokens"][:, 1:])[counted].mean()
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(float(right), rel=1e-6)
    assert metrics["row"] == pytest.approx((B - 1) / 2)
    assert metrics["tokens"] == counted.sum()
    norm = float(optax.tree.norm(grads))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    updates = jax.tree.map(np.subtract, params, state.params)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), updates, grads)


SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": T, "vocab_size": 11}
SHAPE |= {"dropout": 0.3}
TEXTS = Sequences(np.arange(200) % 11, np.cumsum([0, *[3, 8, 5, 2, 7] * 8]))
EXAMPLES = [
    (
        ClassifierConfig(**SHAPE, labels=("a", "b")),
        LabelledTexts(TEXTS, np.arange(40, dtype=np.int32) % 2, np.full(40, "")),
    ),
    (MaskedLMConfig(**SHAPE), MaskedTexts(TEXTS, 10, 11, 0.3)),
    (Seq2SeqConfig(**SHAPE, label_smoothing=0.1), TextPairs(TEXTS, TEXTS, 0)),
]


@pytest.mark.parametrize(
    ("run", "model", "examples"),
    [
        pytest.param(run, *each, marks=pytest.mark.devices)
        for run in (in_shard_map, in_pmap)
        for each in EXAMPLES
    ],
)
def test_examples_of_unequal_weights_are_summed_over_mapped_devices(
    run, model, examples
):
    config = dataclasses.replace(CONFIG, model=model)
    built = build_model(model, "cpu")
    state = jax.device_get(create_state(built, config, MESH))
    state = state.replace(opt_state=SGD.init(state.params))
    batch = bucketed_source(examples, 0, B, T)(0)
    objective = make_objective(built)
    found = run(make_train_step(objective, SGD, config, "data"), state, batch)
    expected = under_jit(make_train_step(objective, SGD, config), state, batch)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_program_for_8_devices_trains_like_one_device(initial, config):
    one = under_jit(make_train_step(objective, ADAMW, CONFIG), initial)
    state = create_state(MODEL, CONFIG, MESH)
    batches = jax.tree.map(lambda a: a[None], BATCH)
    batches = jax.device_put(batches, jax.NamedSharding(MESH, P(None, "data")))
    traced = trace_train_steps(objective, config, MESH, state, batches)
    state, metrics = traced.lower().compile()(state, batches)
    eight = state, jax.tree.map(lambda a: a[0], metrics)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, one, eight)


def make_chats(counts):
    """Rows of one conversation each, of which the first `counts[row]` targets count."""
    batch = make_batch(counts)
    inputs_BT, targets_BT = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    return inputs_BT, targets_BT, np.ones((B, T), np.int32), 1 * (batch["counts"] > 0)


@pytest.mark.parametrize("make", [make_batch, make_chats])
def test_a_batch_of_weight_0_changes_nothing_and_is_not_a_skipped_step(initial, make):
    of_kind, config = objective, CONFIG
    if make is make_chats:
        config = changed(TINY, model={"n_layer": 1}, mesh={"data": 1})
        model = build_model(config.model, "cpu")
        of_kind = make_objective(model)
        initial = jax.device_get(create_state(model, config, mesh_of(config)))
    step = jax.jit(make_train_step(of_kind, ADAMW, config))
    before, first = step(initial, make([row % (T + 1) for row in range(B)]))
    after, metrics = step(before, make([0] * B))
    assert (after.step, after.skipped) == (before.step + 1, 0)
    assert metrics["tokens"] == 0
    assert np.isnan(metrics["loss"])
    unchanged = (before.params, before.opt_state), (after.params, after.opt_state)
    jax.tree.map(np.testing.assert_array_equal, *unchanged)
    _, later = step(after, make([1] * B))
    assert later["learning_rate"] == metrics["learning_rate"]  # as no update was made
    assert later["learning_rate"] > first["learning_rate"]
