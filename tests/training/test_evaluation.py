from functools import partial

import jax
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt.ops import cross_entropy
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.text.batches import evaluation_source
from jaxgpt.training.evaluation import (
    compile_estimate,
    compile_losses,
    estimate,
    evaluate_exactly,
)
from jaxgpt.training.objectives import LossSum, next_token, validation_metric

T = TINY.model.block_size


@pytest.fixture(params=[1, 2, T, T + 1, T + 2, 5 * T + 1, 93])
def tokens(request):
    """Splits whose predictions do and do not fill the last window."""
    rng = np.random.default_rng(request.param)
    return rng.integers(11, size=request.param + 1).astype(np.uint16)


def test_exact_loss_predicts_every_token_but_the_first_once(tiny_model, tokens):
    model, params = tiny_model
    losses = []
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1].astype(np.int32)[None]
        logits = model.apply({"params": params}, window[:, :-1])
        losses += cross_entropy(logits, window[:, 1:])[0].tolist()
    assert len(losses) == len(tokens) - 1
    for batch_size in (1, 3, 8):
        config = changed(TINY, data={"batch_size": batch_size})
        mesh = make_mesh(config, lambda line: None)
        eval_step = compile_losses(model, mesh)
        exact = evaluate_exactly(eval_step, params, tokens, config)
        assert exact.tokens == len(losses)
        assert exact.nats_per_token == pytest.approx(np.mean(losses), abs=1e-6)


@pytest.mark.parametrize("stride", [1, 3, T - 1, T])
def test_a_stride_predicts_each_token_once_from_its_own_window(
    tiny_model, tokens, stride
):
    model, params = tiny_model
    count, expected = len(tokens) - 1, []
    for i in range(count):  # prediction i is of token i + 1, from token i and earlier
        start = max(0, -(-(i + 1 - T) // stride)) * stride
        window = np.zeros((1, T), np.int32)
        window[0, : i + 1 - start] = tokens[start : i + 1]
        losses = loss_of_each_target(model, params, window)
        expected.append(losses[i - start, tokens[i + 1]])
    config = changed(TINY, data={"batch_size": 3})
    eval_step = compile_losses(model, make_mesh(config, lambda line: None))
    exact = evaluate_exactly(eval_step, params, tokens, config, stride)
    assert exact.tokens == count
    assert exact.nats_per_token == pytest.approx(np.mean(expected), abs=1e-5)


@partial(jax.jit, static_argnums=0)
def loss_of_each_target(model, params, window):
    """Losses [T, V] were the next token this or that."""
    return -jax.nn.log_softmax(model.apply({"params": params}, window)[0])


def evaluate_losses(losses, stride=None):
    """Evaluates a text whose prediction i has loss losses[i]."""
    tokens = np.arange(len(losses) + 1)

    def eval_step(params, batch):
        return np.asarray(params)[batch[1] - 1]

    return evaluate_exactly(eval_step, losses, tokens, TINY, stride)


def test_the_standard_error_is_that_of_a_mean_of_windows():
    rng = np.random.default_rng(0)
    windows = rng.normal(2, 1, (50, 1)) + rng.normal(0, 1, (50, T))
    exact = evaluate_losses(windows.ravel())
    means = windows.mean(axis=1)
    assert exact.nats_per_token == pytest.approx(means.mean())
    assert exact.standard_error == pytest.approx(means.std(ddof=1) / 50**0.5)
    # Taken for independent, the tokens would seem to say far more.
    assert exact.standard_error > 1.5 * windows.std() / windows.size**0.5
    # It does not depend on how the text was read.
    assert evaluate_losses(windows.ravel(), 3).standard_error == exact.standard_error


@pytest.mark.parametrize("last", [2.0, 9.0])
def test_a_short_last_window_weighs_little_in_the_standard_error(last):
    rng = np.random.default_rng(0)
    losses = np.append(rng.normal(2, 1, 50 * T), last)
    windows = np.split(losses, range(T, len(losses), T))
    left_out = [
        np.concatenate(windows[:i] + windows[i + 1 :]).mean()
        for i in range(len(windows))
    ]
    jackknife = np.sqrt(len(windows) - 1) * np.std(left_out)
    assert evaluate_losses(losses).standard_error == pytest.approx(jackknife, rel=0.05)


def test_one_window_has_no_standard_error():
    assert evaluate_losses(np.ones(T)).standard_error is None


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss):
    with pytest.raises(FloatingPointError, match=f"the loss is {loss}: the parameters"):
        evaluate_losses(np.append(np.ones(T), loss))


def estimates(objective, config, params, train, val, batches=2):
    splits = {"train": train, "val": val}
    sources = {name: evaluation_source(splits[name], config) for name in splits}
    return estimate(
        compile_estimate(objective, make_mesh(config)), sources, params, batches
    )


def test_estimates_compare_whatever_the_seed_and_differ_between_splits(tiny_model):
    model, params = tiny_model
    rng = np.random.default_rng(0)
    splits = rng.integers(11, size=99), rng.integers(4, size=99)
    one, other = (
        estimates(
            next_token(model), changed(TINY, train={"seed": seed}), params, *splits
        )
        for seed in (1, 2)
    )
    assert one == other
    assert one["train_loss"] != one["val_loss"]
    assert validation_metric(next_token(model)) == "val_loss"


def test_estimates_are_means_over_what_counts_of_all_that_is_reported():
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
    largest = found[validation_metric(objective)]  # by which the best is chosen
    assert largest == found["val_largest"] == pytest.approx(seen.max((1, 2)).mean())


def test_an_evaluation_in_which_nothing_counts_says_what_to_do():
    def objective(params, batch, context):
        return LossSum(jax.numpy.float32(0), jax.numpy.float32(0)), {}

    tokens = np.zeros(99, np.uint16)
    with pytest.raises(ValueError, match="nothing counts for train_loss in 2 batches"):
        estimates(objective, TINY, {}, tokens, tokens)


def test_many_evaluations_on_many_devices_do_not_deadlock(tiny_model):
    model, params = tiny_model
    params = jax.device_put(params, jax.devices()[0])
    splits = np.zeros(99, np.uint16), np.ones(99, np.uint16)
    losses = estimates(next_token(model), TINY, params, *splits, batches=200)
    assert all(np.isfinite(list(losses.values())))
