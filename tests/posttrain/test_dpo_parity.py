"""DPO against TRL's formulas, written out in PyTorch on the same numbers.

Source: trl/trainer/dpo_trainer.py, loss type "sigmoid". B pairs   T time   V vocab
"""

import jax
import numpy as np
import pytest
import torch
from conftest import TINY, changed, random_params

from jaxgpt.interop.torch_models import torch_of_params
from jaxgpt.models import build_model
from jaxgpt.text.examples import Preferences, Sequences, row_keys
from jaxgpt.training.objectives import Context, dpo, pair_log_probs

BETA, B, T = 0.3, 5, 16
CONFIG = changed(TINY, model={"n_layer": 2, "block_size": T, "dropout": 0.0}).model
MODEL = build_model(CONFIG, "cpu")


@pytest.fixture(scope="module")
def batch():
    """Pairs of unequal lengths."""
    rng = np.random.default_rng(3)
    prompts_N, texts = rng.integers(1, 6, B), []
    for count in prompts_N:
        prompt = rng.integers(11, size=count)
        for _ in range(2):
            texts.append([*prompt, *rng.integers(11, size=rng.integers(1, 11))])
    pairs = Preferences(Sequences.join(texts), prompts_N)
    rows, ones = np.arange(B), np.ones(B, np.float32)
    batch = pairs.read(rows, T, ones, row_keys(0, rows))
    reference = random_params(MODEL, std=0.35)
    reference_B2 = log_probs_of(reference, batch)
    return batch._replace(reference_B2=np.asarray(reference_B2)), reference


@jax.jit
def log_probs_of(params, batch):
    return pair_log_probs(MODEL, params, batch, Context(None, np.arange(B)))


def torch_log_probs(model, batch):
    """Sums of the log-probabilities of completions, by gather, as TRL's."""
    input_ids = torch.tensor(batch.tokens_B2T.reshape(-1, T), dtype=torch.long)
    lengths = torch.tensor(batch.lengths_B2.reshape(-1, 1))
    prompts = torch.tensor(batch.prompts_B).repeat_interleave(2)[:, None]
    place = torch.arange(T)[None]
    completion_mask = (place >= prompts) & (place < lengths)
    shift_logits = model.module(input_ids).logits[:, :-1].log_softmax(-1)
    shift_labels = input_ids[:, 1:]
    per_token = shift_logits.gather(2, shift_labels[..., None]).squeeze(-1)
    return (per_token * completion_mask[:, 1:]).sum(-1).reshape(-1, 2)


def test_a_dpo_step_has_trls_loss_metrics_and_gradient(batch):
    batch, reference = batch
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda a: a + rng.normal(0, 0.05, a.shape).astype(np.float32), reference
    )

    policy, ref = (torch_of_params(CONFIG, each) for each in (params, reference))
    logps = torch_log_probs(policy, batch)
    with torch.no_grad():
        ref_logps = torch_log_probs(ref, batch)
    chosen_logratios, rejected_logratios = (logps - ref_logps).unbind(1)
    delta = chosen_logratios - rejected_logratios
    loss = -torch.nn.functional.logsigmoid(BETA * delta).mean()
    chosen_rewards, rejected_rewards = (
        BETA * chosen_logratios,
        BETA * rejected_logratios,
    )
    accuracy = (chosen_rewards > rejected_rewards).float().mean()
    margin = (chosen_rewards - rejected_rewards).mean()
    loss.backward()

    def close(found, expected):
        expected = expected.detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    close(log_probs_of(params, batch), logps)
    close(batch.reference_B2, ref_logps)
    rewards_B2 = BETA * (log_probs_of(params, batch) - batch.reference_B2)
    close(rewards_B2, torch.stack([chosen_rewards, rejected_rewards], 1))
    objective = dpo(MODEL, BETA)

    def mean_loss(params):
        found, metrics = objective(params, batch, Context(None, np.arange(B)))
        return found.mean(), {name: each.mean() for name, each in metrics.items()}

    step = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    (found, metrics), gradient = step(params)
    close(found, loss)
    close(metrics["accuracy"], accuracy)
    close(metrics["margin"], margin)
    assert 0 < metrics["accuracy"] < 1
    assert abs(metrics["margin"]) > 0.01
    theirs, ours = dict(policy.module.named_parameters()), policy.tensors(gradient)
    assert max(abs(a).max() for a in ours.values()) > 0.01
    for name, array in ours.items():
        if name in theirs:  # the head is the embedding
            close(array, theirs[name].grad)
    assert len(ours.keys() & theirs.keys()) > 10
