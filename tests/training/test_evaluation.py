from functools import cache

import jax
import numpy as np
import pytest
from conftest import TINY, changed, logits_of, mesh_of

from jaxgpt.parallel.mesh import replicated
from jaxgpt.text.batches import evaluation_source
from jaxgpt.training import evaluation
from jaxgpt.training.evaluation import evaluate_exactly, make_losses_step
from jaxgpt.training.objectives import LossSum, next_token, validation_metric

T = TINY.model.block_size


def losses_of_next(model, params, window):
    """The losses [T, V] of every possible target in a window of at most T tokens."""
    window = np.resize(window.astype(np.int32), (1, T))
    return -np.array(jax.nn.log_softmax(logits_of(model, params, window)[0]))


@cache
def compiled(model, batch_size):
    """The `EvalStep`, config and mesh for a batch size, which is split over devices."""
    config = changed(TINY, data={"batch_size": batch_size})
    mesh = mesh_of(config)
    return make_losses_step(model, mesh), config, mesh


@pytest.mark.parametrize("count", [1, 2, T, T + 1, T + 2, 5 * T + 1, 93])
@pytest.mark.parametrize("stride", [1, 3, T - 1, T])
def test_the_exact_loss_predicts_each_token_once_from_its_own_window(
    tiny_model, count, stride, monkeypatch
):
    monkeypatch.setattr(evaluation, "evaluations_per_call", lambda *given: 2)
    tokens = np.random.default_rng(count).integers(11, size=count + 1).astype(np.uint16)
    (model, params), expected = tiny_model, []
    for i in range(count):  # prediction i is of token i + 1, from token i and earlier
        start = max(0, -(-(i + 1 - T) // stride)) * stride
        losses = losses_of_next(model, params, tokens[start : i + 1])
        expected.append(losses[i - start, tokens[i + 1]])
    for batch_size in (1, 3, 8) if stride == T else (3,):
        eval_step, *where = compiled(model, batch_size)
        exact = evaluate_exactly(
            eval_step, params, tokens, *where, stride, (done := []).append
        )
        assert exact.tokens == sum(done) == count
        assert max(done) <= 2 * batch_size * stride + T - stride
        assert exact.nats_per_token == pytest.approx(np.mean(expected), abs=1e-6)
    if stride == T:
        assert evaluate_exactly(eval_step, params, tokens, *where) == exact


def evaluate_losses(losses, stride=None):
    """Evaluates a text whose prediction i has loss losses[i]."""

    def step(params, batches):
        _, targets_NBT, parts_NBT = jax.device_get(batches)
        in_part = parts_NBT[:, :, None] == np.array([1, 2])[:, None]
        return np.where(in_part, losses[targets_NBT - 1][:, :, None], 0).sum(-1)

    text = np.arange(len(losses) + 1)
    return evaluate_exactly(step, None, text, TINY, mesh_of(TINY), stride)


def test_the_standard_error_is_that_of_a_mean_of_windows():
    rng = np.random.default_rng(0)
    windows = rng.normal(2, 1, (50, 1)) + rng.normal(0, 1, (50, T))
    exact = evaluate_losses(windows.ravel())
    means = windows.mean(axis=1)
    assert exact.standard_error == pytest.approx(means.std(ddof=1) / 50**0.5)
    assert evaluate_losses(windows.ravel(), 3).standard_error == exact.standard_error
    assert evaluate_losses(np.ones(T)).standard_error is None  # of one window


@pytest.mark.parametrize("last", [2.0, 9.0])
def test_a_short_last_window_has_little_weight_in_the_standard_error(last):
    rng = np.random.default_rng(0)
    losses = np.append(rng.normal(2, 1, 50 * T), last)
    windows = np.split(losses, range(T, len(losses), T))
    rest = [windows[:i] + windows[i + 1 :] for i in range(len(windows))]
    means = [np.concatenate(others).mean() for others in rest]
    jackknife = np.sqrt(len(windows) - 1) * np.std(means)
    assert evaluate_losses(losses).standard_error == pytest.approx(jackknife, rel=0.05)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_non_finite_loss_is_an_error(loss):
    with pytest.raises(FloatingPointError, match=f"loss is {loss}"):
        evaluate_losses(np.append(np.ones(T), loss))


def estimates(objective, config, params, train, val, batches=2):
    config = changed(config, train={"eval_iters": batches})
    splits, mesh = {"train": train, "val": val}, mesh_of(config)
    sources = {name: evaluation_source(splits[name], config) for name in splits}
    eval_step = evaluation.make_eval_step(objective, mesh)
    batches = evaluation.read_evaluation(sources, config, mesh)
    return evaluation.estimate(eval_step, params, batches)


def test_estimates_do_not_depend_on_the_seed_but_on_the_split(bigram):
    objective, rng = next_token(bigram[0]), np.random.default_rng(0)
    splits = rng.integers(11, size=99), rng.integers(4, size=99)
    one, other = (
        estimates(objective, changed(TINY, train={"seed": n}), bigram[1], *splits)
        for n in (1, 2)
    )
    assert one == other
    assert one["train_loss"] != one["val_loss"]
    assert validation_metric(objective) == "val_loss"


def test_estimates_are_weighted_means_of_all_metrics():
    def objective(params, batch, context):
        inputs_BT, _ = batch
        odd_BT = inputs_BT % 2
        assert context.key is None
        loss = LossSum((odd_BT * inputs_BT).sum(), odd_BT.sum())
        return loss, {"largest": LossSum(inputs_BT.max(), jax.numpy.float32(1))}

    objective.metric = "largest"
    tokens, batches = np.random.default_rng(0).integers(11, size=99), 3
    found = estimates(objective, TINY, {}, tokens, tokens, batches)
    source = evaluation_source(tokens, TINY)
    seen = np.stack([source(step, slice(None))[0] for step in range(batches)])
    assert found["train_loss"] == pytest.approx(seen[seen % 2 == 1].mean())
    largest = found[validation_metric(objective)]  # picks the best checkpoint
    assert largest == found["val_largest"] == pytest.approx(seen.max((1, 2)).mean())


def test_the_estimate_is_the_mean_of_batches_of_which_one_program_does_many(
    tiny_model, monkeypatch
):
    (model, params), mesh = tiny_model, mesh_of(TINY)
    tokens = np.random.default_rng(0).integers(11, size=99)
    source, expected = evaluation_source(tokens, TINY), []
    for step in range(6):
        inputs_BT, targets_BT = source(step, slice(None))
        log_probs_BTV = jax.nn.log_softmax(logits_of(model, params, inputs_BT))
        expected.append(-np.take_along_axis(log_probs_BTV, targets_BT[..., None], -1))
    compiled, objective = [], next_token(model)

    def noted(params, batch, context):
        compiled.append(batch[0].shape)
        return objective(params, batch, context)

    monkeypatch.setattr(evaluation, "evaluations_per_call", lambda *given: 3)
    eval_step = evaluation.make_eval_step(noted, mesh)
    config = changed(TINY, train={"eval_iters": 6})
    for held_bytes in (evaluation.HELD_BYTES, 0):  # then they are read each time
        monkeypatch.setattr(evaluation, "HELD_BYTES", held_bytes)
        batches = evaluation.read_evaluation({"val": source}, config, mesh)
        assert isinstance(batches["val"], list) == (held_bytes > 0)
        for _ in range(2):
            found = evaluation.estimate(eval_step, params, batches, (done := []).append)
            assert found == {"val_loss": pytest.approx(np.mean(expected), rel=1e-6)}
            assert done == [3, 3]
    assert compiled == [(8, T)]


def test_an_evaluation_of_weight_0_is_an_error():
    nothing = LossSum(jax.numpy.float32(0), jax.numpy.float32(0)), {}
    tokens = np.zeros(99, np.uint16)
    with pytest.raises(ValueError, match="train_loss"):
        estimates(lambda *args: nothing, TINY, {}, tokens, tokens)


def test_many_dispatches_on_many_devices_do_not_deadlock(bigram, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluations_per_call", lambda *given: 1)
    model, params = bigram
    params = jax.device_put(params, replicated(mesh_of(TINY)))
    splits = np.zeros(99, np.uint16), np.ones(99, np.uint16)
    losses = estimates(next_token(model), TINY, params, *splits, batches=200)
    expected = -jax.nn.log_softmax(params["table"]["embedding"]).diagonal()
    assert losses["train_loss"] == pytest.approx(float(expected[0]), rel=1e-6)
    assert losses["val_loss"] == pytest.approx(float(expected[1]), rel=1e-6)
