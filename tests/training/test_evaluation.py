import jax
import numpy as np
import pytest
from conftest import TINY, changed

from jaxgpt.text.corpus import Corpus
from jaxgpt.training.evaluation import estimate_losses, evaluate_exactly
from jaxgpt.training.objective import token_losses
from jaxgpt.training.sharding import make_mesh
from jaxgpt.training.step import compile_eval_step

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
        losses += token_losses(logits, window[:, 1:])[0].tolist()
    assert len(losses) == len(tokens) - 1
    for batch_size in (1, 3, 8):
        config = changed(TINY, data={"batch_size": batch_size})
        mesh = make_mesh(config, lambda line: None)
        eval_step = compile_eval_step(model, mesh)
        exact = evaluate_exactly(eval_step, params, tokens, config)
        assert exact.tokens == len(losses)
        assert exact.nats_per_token == pytest.approx(np.mean(losses), abs=1e-6)


def test_estimates_compare_whatever_the_seed_and_differ_between_splits(tiny_model):
    model, params = tiny_model
    rng = np.random.default_rng(0)
    corpus = Corpus(rng.integers(11, size=99), rng.integers(4, size=99), None)
    eval_step = compile_eval_step(model, make_mesh(TINY))
    one, other = (
        estimate_losses(eval_step, corpus, changed(TINY, train={"seed": seed}), params)
        for seed in (1, 2)
    )
    assert one == other
    assert one["train_loss"] != one["val_loss"]


def test_many_evaluations_on_many_devices_do_not_deadlock(tiny_model):
    model, params = tiny_model
    config = changed(TINY, train={"eval_iters": 200})
    corpus = Corpus(np.zeros(99, np.uint16), np.ones(99, np.uint16), None)
    eval_step = compile_eval_step(model, make_mesh(config))
    params = jax.device_put(params, jax.devices()[0])
    losses = estimate_losses(eval_step, corpus, config, params)
    assert all(np.isfinite(list(losses.values())))
