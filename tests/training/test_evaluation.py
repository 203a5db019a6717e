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
    """The `EvalStep` and the config for a batch size."""
    config = changed(TINY, data={"batch_size": batch_size})
    return make_losses_step(model, mesh_of(config)), config


@pytest.mark.parametrize("count", [1, 2, T, T + 1, T + 2, 5 * T + 1, 93])
@pytest.mark.parametrize("stride", [1, 3, T - 1, T])
def test_the_exact_loss_predicts_each_token_once_from_its_own_window(
    tiny_model, count, stride
):
    tokens = np.random.default_rng(count).integers(11, size=count + 1).astype(np.uint16)
    (model, params), expected = tiny_model, []
    for i in range(count):  # prediction i is of token i + 1, from token i and earlier
        start = max(0, -(-(i + 1 - T) // stride)) * stride
        losses = losses_of_next(model, params, tokens[start : i + 1])
        expected.append(losses[i - start, tokens[i + 1]])
    for batch_size in (1, 3, 8) if stride == T else (3,):
        eval_step, config = compiled(model, batch_size)
        exact = evaluate_exactly(
            eval_step, params, tokens, config, stride, (done := []).append
        )
        assert exact.tokens == sum(done) == count
        assert exact.nats_per_token == pytest.approx(np.mean(expected), abs=1e-6)
    if stride == T:
        assert evaluate_exactly(eval_step, params, tokens, config) == exact


def evaluate_losses(losses, stride=None):
    """Evaluates a text whose prediction i has loss losses[i]."""
    step, text = lambda params, batch: losses[batch[1] - 1], np.arange(len(losses) + 1)
    return evaluate_exactly(step, None, text, TINY, stride)


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
    train, val = (evaluation_source(tokens, config) for tokens in (train, val))
    eval_step = evaluation.make_eval_step(objective, mesh_of(config))
    return evaluation.estimate(eval_step, {"train": train, "val": val}, params, batches)


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


def test_an_evaluation_of_weight_0_is_an_error():
    nothing = LossSum(jax.numpy.float32(0), jax.numpy.float32(0)), {}
    tokens = np.zeros(99, np.uint16)
    with pytest.raises(ValueError, match=r"train_loss .* 2 batches"):
        estimates(lambda *args: nothing, TINY, {}, tokens, tokens)


def test_many_evaluations_on_many_devices_do_not_deadlock(bigram):
    model, params = bigram
    params = jax.device_put(params, replicated(mesh_of(TINY)))
    splits = np.zeros(99, np.uint16), np.ones(99, np.uint16)
    losses = estimates(next_token(model), TINY, params, *splits, batches=200)
    expected = -jax.nn.log_softmax(params["table"]["embedding"]).diagonal()
    assert losses["train_loss"] == pytest.approx(float(expected[0]), rel=1e-6)
    assert losses["val_loss"] == pytest.approx(float(expected[1]), rel=1e-6)
