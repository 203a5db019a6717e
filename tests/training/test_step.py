from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, train_on
from jax.sharding import PartitionSpec as P

from jaxgpt import TrainConfig
from jaxgpt.models import build_model
from jaxgpt.parallel import defaults
from jaxgpt.parallel.feeding import stack_batches
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.text.batches import training_source
from jaxgpt.training.objectives import next_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import (
    check_skipped,
    create_state,
    make_train_step,
    steps_in_next_call,
)

STEPS = 4
TOKENS = np.random.default_rng(0).integers(11, size=200).astype(np.uint16)
BATCHES = stack_batches(training_source(TOKENS, TINY), range(STEPS))


def run(config, calls=(STEPS,)):
    """Trains for STEPS steps, so many a call; returns losses, norms and parameters."""
    model, mesh = build_model(config.model, "cpu"), make_mesh(config, lambda line: None)
    state, rows, done = create_state(model, config, mesh), [], 0
    for count in calls:
        batches = jax.tree.map(lambda a: a[done : done + count], BATCHES)  # noqa: B023
        state, metrics = train_on(model, config, mesh, state, batches)
        rows += zip(metrics["loss"], metrics["grad_norm"], strict=True)
        done += count
    assert state.step == STEPS
    return jax.device_get((rows, state.params))


@pytest.fixture(scope="module")
def reference():
    """Plain training on one device, dropout on."""
    return run(changed(TINY, mesh={"data": 1}))


def assert_same(one, other, tolerance):
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=0, atol=tolerance), one, other
    )


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_accumulated_microbatches_train_as_the_whole_batch_with_dropout(
    reference, microbatches
):
    data = {"gradient_accumulation_steps": microbatches}
    assert_same(run(changed(TINY, data=data, mesh={"data": 1})), reference, 2e-5)


def test_pieces_that_a_cpu_chooses_train_as_the_whole_batch(reference, monkeypatch):
    monkeypatch.setattr(defaults, "CACHED_TOKENS", 16)  # of 8 x 8: 4 microbatches
    config = changed(TINY, mesh={"data": 1})
    assert defaults.with_microbatches(config, make_mesh(config)).data.microbatches == 4
    assert_same(run(config), reference, 2e-5)


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_that_share_the_batch_train_as_one(reference, devices):
    assert_same(run(changed(TINY, mesh={"data": devices})), reference, 2e-5)


def test_pieces_on_several_devices_train_as_one_whole(reference):
    config = changed(TINY, data={"gradient_accumulation_steps": 2}, mesh={"data": 4})
    assert_same(run(config), reference, 2e-5)


def test_steps_in_one_call_are_bitwise_those_of_several_calls(reference):
    assert_same(run(changed(TINY, mesh={"data": 1}), (1, 1, 1, 1)), reference, 0)


def test_dropout_differs_from_row_to_row():
    alike = jax.tree.map(lambda a: np.stack([a[0, 0]] * 8)[None], BATCHES)
    losses = []
    for batch_size in (1, 8):
        config = changed(TINY, data={"batch_size": batch_size}, mesh={"data": 1})
        model, mesh = (
            build_model(config.model, "cpu"),
            make_mesh(config, lambda line: None),
        )
        rows = jax.tree.map(lambda a: a[:, :batch_size], alike)  # noqa: B023
        state = create_state(model, config, mesh)
        _, metrics = train_on(model, config, mesh, state, rows)
        losses.append(float(metrics["loss"][0]))
    assert losses[0] != pytest.approx(losses[1], abs=1e-6)


def test_dropout_changes_from_step_to_step():
    config = changed(TINY, optimizer={"learning_rate": 1e-12, "min_lr": 0.0})
    same = jax.tree.map(lambda a: np.stack([a[0]] * 2), BATCHES)
    model, mesh = build_model(config.model, "cpu"), make_mesh(config)
    state = create_state(model, config, mesh)
    _, metrics = train_on(model, config, mesh, state, same)
    assert metrics["loss"][0] != metrics["loss"][1]


def run_mapped(train_step, state, batches):
    """As `run`, with a step that is mapped over devices in one way or another."""
    rows = []
    for step in range(STEPS):
        state, metrics = train_step(state, jax.tree.map(lambda a: a[step], batches))  # noqa: B023
        rows.append((metrics["loss"], metrics["grad_norm"]))
    return jax.device_get((rows, state.params))


def mapped_step(config):
    """The train step of one of the devices of an axis "data"."""
    objective = next_token(build_model(config.model, "cpu"))
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    return make_train_step(objective, optimizer, config, axis_name="data")


def state_of(config):
    mesh = make_mesh(config, lambda line: None)
    return create_state(build_model(config.model, "cpu"), config, mesh)


def test_pmap_trains_as_one_device(reference):
    shards = jax.tree.map(lambda a: a.reshape(STEPS, 8, 1, *a.shape[2:]), BATCHES)
    copies = jax.tree.map(lambda a: np.stack([a] * 8), state_of(TINY))
    result = run_mapped(jax.pmap(mapped_step(TINY), axis_name="data"), copies, shards)
    for device in range(8):
        one = jax.tree.map(lambda a: a[device], result)  # noqa: B023
        assert_same(one, reference, 2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_shard_map_trains_as_one_device(reference, check_vma, microbatches):
    data = {"gradient_accumulation_steps": microbatches}
    config = changed(TINY, data=data, mesh={"data": 4})
    sharded_step = jax.shard_map(
        mapped_step(config),
        mesh=make_mesh(config),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    result = run_mapped(jax.jit(sharded_step), state_of(config), BATCHES)
    assert_same(result, reference, 2e-5)


def test_seed_decides_the_initial_parameters():
    one, again, other = (
        state_of(changed(TINY, train={"seed": seed})).params["wte"]
        for seed in (1, 1, 2)
    )
    assert_same(one, again, 0)
    assert not np.allclose(one["embedding"], other["embedding"])


def test_no_call_runs_past_what_is_due_and_two_sizes_are_enough():
    config = TrainConfig(
        max_steps=23, eval_interval=10, checkpoint_interval=7, steps_per_call=4
    )
    stops, step = [], 0
    while step < 23:
        count = steps_in_next_call(step, config)
        assert count in (1, 4)
        step += count
        stops.append(step)
    assert stops == [4, 5, 6, 7, 8, 9, 10, 14, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("limit", "step", "skipped", "updates"), [(5, 5, 2, 3), (1, 3, 2, 2), (0, 1, 1, 1)]
)
def test_a_step_that_is_not_finite_changes_nothing_and_one_too_many_stops_all(
    limit, step, skipped, updates
):
    # In a bigram's table the row of token 10 is infinite: no batch without it knows.
    train = {"max_skipped_steps": limit}
    config = changed(TINY, model={"architecture": "bigram"}, train=train)
    good = np.random.default_rng(0).integers(0, 10, (3, 2, 8, TINY.model.block_size))
    bad = np.full_like(good[0], 10)
    mesh, bigram = make_mesh(config), build_model(config.model, "cpu")

    def train(batches):
        state = create_state(bigram, config, mesh)
        params = jax.tree.map(lambda a: a.at[10].set(jnp.inf), state.params)
        state = state.replace(params=params)
        inputs, targets = np.stack(batches).astype(np.int32).swapaxes(0, 1)
        return train_on(bigram, config, mesh, state, (inputs, targets))

    state, metrics = train([good[0], bad, good[1], bad, good[2]])
    assert (state.step, state.skipped) == (step, skipped)
    assert metrics["skipped"][-1] == skipped
    only_good, rates = train(good[:updates])
    jax.tree.map(np.testing.assert_array_equal, state.params, only_good.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, only_good.opt_state)
    rate = metrics["learning_rate"][0 if limit == 0 else 2]
    assert rate == rates["learning_rate"][0 if limit == 0 else 1]


def test_a_state_that_has_skipped_more_than_it_may_does_not_go_on():
    state = create_state(build_model(TINY.model, "cpu"), TINY, make_mesh(TINY))
    check_skipped(state, TINY)
    with pytest.raises(ValueError, match=r"skipped 2 steps .* --train.max-skipped"):
        check_skipped(state.replace(skipped=np.int32(2)), TINY)
