import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXAMPLE_KINDS, TINY, changed, mesh_of, random_examples
from jax.sharding import PartitionSpec as P

from jaxgpt import TrainConfig
from jaxgpt.models import build_model
from jaxgpt.parallel import defaults
from jaxgpt.parallel.defaults import steps_in_next_call
from jaxgpt.parallel.feeding import read_batches, stack_batches
from jaxgpt.text.batches import training_source
from jaxgpt.training import step
from jaxgpt.training.objectives import Context, make_objective, next_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import (
    abstract_state,
    check_skipped,
    create_state,
    dropout_key,
    make_train_program,
    make_train_step,
    trace_train_steps,
)

STEPS = 4
ONE_LAYER = changed(TINY, model={"n_layer": 1})
ONE_DEVICE = changed(ONE_LAYER, mesh={"data": 1})
BIGRAM = changed(ONE_DEVICE, model={"architecture": "bigram"})
TOKENS = np.random.default_rng(0).integers(11, size=200).astype(np.uint16)
BATCHES = stack_batches(training_source(TOKENS, TINY), range(STEPS))


def state_of(config):
    return create_state(build_model(config.model, "cpu"), config, mesh_of(config))


def run(config, steps_per_call=STEPS, batches=BATCHES):
    """Trains for STEPS steps; returns losses, gradient norms and parameters."""
    state, mesh = state_of(config), mesh_of(config)
    objective = make_objective(build_model(config.model, "cpu"), config.dpo)
    calls = jax.tree.map(lambda a: a.reshape(-1, steps_per_call, *a.shape[1:]), batches)
    count = STEPS // steps_per_call
    calls = [jax.tree.map(lambda a, n=n: a[n], calls) for n in range(count)]
    traced = trace_train_steps(objective, config, mesh, state, calls[0])
    train_steps, rows = traced.lower().compile(), []
    for batches in calls:
        state, metrics = train_steps(state, batches)
        rows += zip(metrics["loss"], metrics["grad_norm"], strict=True)
    assert state.step == STEPS
    return jax.device_get((rows, state.params))


def step_of(config, axis_name=None):
    """The train step, for use inside `jit`, `pmap` or `shard_map`."""
    objective = next_token(build_model(config.model, "cpu"))
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    return make_train_step(objective, optimizer, config, axis_name)


@pytest.fixture(scope="module")
def reference():
    """Training on one device, with the whole batch at once and dropout on."""
    return run(ONE_DEVICE)


def assert_same(one, other, tolerance):
    close = partial(np.testing.assert_allclose, rtol=0, atol=tolerance)
    jax.tree.map(close, one, other)


WIDER = partial(pytest.param, marks=pytest.mark.devices)
SPLITS = [(2, 4), (2, 1), (4, 1), (8, 1), (1, 2), (1, 8)]


@pytest.mark.devices
@pytest.mark.parametrize(("microbatches", "devices"), SPLITS)
def test_microbatches_and_devices_train_like_the_whole_batch_on_one_device(
    reference, microbatches, devices
):
    data = {"gradient_accumulation_steps": microbatches}
    config = changed(ONE_LAYER, data=data, mesh={"data": devices})
    assert_same(run(config), reference, 2e-5)


@pytest.mark.devices
@pytest.mark.parametrize("architecture", EXAMPLE_KINDS)
def test_examples_train_alike_however_they_are_split(architecture):
    """Rows have unequal weights: numbers of predicted tokens."""
    lengths = np.random.default_rng(0).integers(2, 17, 50)
    examples, config = random_examples(architecture, lengths)
    source = training_source(examples, config)
    batches = stack_batches(source, range(STEPS))
    whole = changed(config, mesh={"data": 1})
    expected = run(whole, batches=batches)
    assert_same(run(whole, steps_per_call=1, batches=batches), expected, 0)
    cube = {"data": 2, "fsdp": 2, "tensor": 2}
    for microbatches, mesh in [(2, {"data": 2}), (4, {"data": 1}), (1, cube)]:
        data = {"gradient_accumulation_steps": microbatches}
        split = changed(config, data=data, mesh=mesh)
        assert_same(run(split, batches=batches), expected, 2e-5)


@pytest.mark.devices
def test_the_microbatches_that_a_cpu_prefers_train_like_the_whole_batch(
    reference, monkeypatch
):
    monkeypatch.setattr(defaults, "CACHED_TOKENS", 16)  # of 8 x 8: 4 microbatches
    config = defaults.with_microbatches(ONE_DEVICE, mesh_of(ONE_DEVICE))
    assert config.data.microbatches == 4
    assert_same(run(ONE_DEVICE), reference, 2e-5)


def test_steps_in_one_call_equal_steps_in_several_calls_bit_for_bit(reference):
    assert_same(run(ONE_DEVICE, steps_per_call=1), reference, 0)


@pytest.mark.parametrize(
    ("microbatches", "check_vma"),
    [(2, True), WIDER(2, False), WIDER(1, True), WIDER(1, False)],
)
def test_shard_map_trains_like_one_device(reference, microbatches, check_vma):
    data = {"gradient_accumulation_steps": microbatches}
    config = changed(ONE_LAYER, data=data, mesh={"data": 4})
    step, mesh = step_of(config, "data"), mesh_of(config)
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    train_step = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))
    state, rows = state_of(config), []
    for batch in zip(*BATCHES, strict=True):
        state, metrics = train_step(state, batch)
        rows.append((metrics["loss"], metrics["grad_norm"]))
    assert_same(jax.device_get((rows, state.params)), reference, 2e-5)


def test_dropout_differs_between_rows_and_between_steps():
    """With equal rows, only their indices and the step can tell losses apart."""
    objective = next_token(build_model(ONE_LAYER.model, "cpu"))
    params = state_of(ONE_LAYER).params
    batch = jax.tree.map(lambda a: np.stack([a[0, 0]] * 8), BATCHES)
    rows_B = np.arange(8)

    @jax.jit
    def loss(step, rows_B):
        context = Context(dropout_key(ONE_LAYER, step), rows_B)
        return objective(params, batch, context)[0].total

    state, train_step = state_of(ONE_LAYER), jax.jit(step_of(ONE_LAYER))
    zero, one = (state.replace(step=state.step + step) for step in (0, 1))
    assert train_step(zero, batch)[1]["loss"] != train_step(one, batch)[1]["loss"]
    assert loss(0, rows_B) != loss(0, rows_B + 8)
    of_row = [float(loss(0, np.full(8, row))) for row in rows_B]
    assert len(set(of_row)) == 8
    assert loss(0, rows_B) == pytest.approx(np.mean(of_row), rel=1e-5)


def test_the_seed_determines_the_initial_parameters():
    configs = [changed(BIGRAM, train={"seed": seed}) for seed in (1, 1, 2)]
    one, again, other = (state_of(c).params["table"]["embedding"] for c in configs)
    assert (one == again).all()
    assert not np.allclose(one, other)


def test_no_call_crosses_an_evaluation_or_checkpoint_and_two_sizes_suffice():
    config = TrainConfig(23, eval_interval=10, checkpoint_interval=7, steps_per_call=4)
    stops = [0]
    while stops[-1] < 23:
        stops.append(stops[-1] + steps_in_next_call(stops[-1], config))
    assert stops == [0, 4, 5, 6, 7, 8, 9, 10, 14, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize(
    ("limit", "step", "skipped", "updates"), [(5, 5, 2, 3), (1, 3, 2, 2), (0, 1, 1, 1)]
)
def test_a_non_finite_step_changes_nothing_and_one_above_the_limit_stops_all_others(
    limit, step, skipped, updates
):
    # Only batches with token 10 read its row of the bigram table, which is infinite.
    config = changed(BIGRAM, train={"max_skipped_steps": limit})
    good = np.random.default_rng(0).integers(0, 10, (3, 2, 8, TINY.model.block_size))
    bad, train_step = np.full_like(good[0], 10), jax.jit(step_of(config))

    def train(batches):
        state, rates = state_of(config), []
        params = jax.tree.map(lambda a: a.at[10].set(jnp.inf), state.params)
        state = state.replace(params=params)
        for batch in batches:
            state, metrics = train_step(state, tuple(batch))
            rates.append(metrics["learning_rate"])
        assert metrics["skipped"] == state.skipped
        return state, rates

    state, rates = train([good[0], bad, good[1], bad, good[2]])
    assert (state.step, state.skipped) == (step, skipped)
    only_good, good_rates = train(good[:updates])
    for name in ("params", "opt_state"):
        assert_same(getattr(state, name), getattr(only_good, name), 0)
    assert [rates[i] for i in range(0, step, 2)] == good_rates[: (step + 1) // 2]


def test_a_state_with_more_skipped_steps_than_allowed_is_refused():
    state = state_of(BIGRAM)
    check_skipped(state, BIGRAM)
    with pytest.raises(ValueError, match=r"2 .* --train.max-skipped-steps 0"):
        check_skipped(state.replace(skipped=np.int32(2)), BIGRAM)


def test_train_steps_compile_in_the_background_once_for_each_shape(monkeypatch):
    traced, trace = [], step.trace_train_steps

    def noted(*arguments):
        traced.append(threading.current_thread())
        return trace(*arguments)

    monkeypatch.setattr(step, "trace_train_steps", noted)
    model, mesh = build_model(BIGRAM.model, "cpu"), mesh_of(BIGRAM)
    source = training_source(TOKENS, BIGRAM)
    abstract = abstract_state(model, BIGRAM, mesh)
    train_program = make_train_program(next_token(model), BIGRAM, mesh, abstract)
    for count in (2, 2, 1):
        state = create_state(model, BIGRAM, mesh)
        batches = read_batches(source, range(count), 8, mesh)
        state, metrics = train_program(batches).result()(state, batches)
        assert int(state.step) == len(metrics["loss"]) == count
    assert len(traced) == 2
    assert threading.main_thread() not in traced
    with pytest.raises(ValueError, match="unpack"):  # raised where it is needed
        train_program(batches[:1]).result()
