"""GRPO: its estimates and losses against TRL's formulas in PyTorch, and its groups."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, changed, random_params
from torch.nn import functional

from jaxgpt.config import GRPOConfig
from jaxgpt.interop.torch_models import torch_of_params
from jaxgpt.models import build_model
from jaxgpt.posttrain import grpo
from jaxgpt.posttrain.rollout import Rollout
from jaxgpt.text.batches import training_source
from jaxgpt.text.examples import Prompts, Sequences
from jaxgpt.training.objectives import Context

CONFIG = GRPOConfig(max_new_tokens=4, temperature=0.7, clip=0.2, beta=0.3, group_size=3)
COUNTS = np.array([4, 1, 3, 2, 4, 4], np.int32)
PROMPTS = np.array([3, 3, 3, 2, 2, 2], np.int32)
B, N, T = 6, 4, 8
REWARDS = np.array([1, 0, 0.5, 2, 2, 2], np.float32)


def trl_advantages():
    """As TRL's GRPOTrainer has them, with scale_rewards="group"."""
    grouped = torch.tensor(REWARDS).view(-1, 3)
    mean = grouped.mean(dim=1).repeat_interleave(3)
    std = grouped.std(dim=1).repeat_interleave(3)
    return (torch.tensor(REWARDS) - mean) / (std + 1e-4)


def test_advantages_are_those_of_trl_and_0_in_a_group_of_equal_rewards():
    found = grpo.group_advantages(jnp.array(REWARDS), 3)
    np.testing.assert_allclose(found, trl_advantages(), rtol=0, atol=1e-5)
    assert not found[3:].any()
    assert found[0] > 0.9
    assert not grpo.group_advantages(jnp.array(REWARDS), 1).any()


def test_losses_gradients_and_entropy_are_those_of_trl():
    model = build_model(TINY.model, "cpu")
    params = random_params(model, mean=0.0, std=0.2)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(11, size=(B, T)).astype(np.int32)
    moves = rng.normal(0, 0.3, (2, B, N)).astype(np.float32)

    # PyTorch: log-probabilities and entropies of the response's tokens.
    reference = torch_of_params(TINY.model, params)
    reference.module.eval()
    tokens = torch.tensor(tokens_BT).long()
    at = (torch.tensor(PROMPTS).long()[:, None] + torch.arange(N)).clamp(max=T - 1)
    logits = reference.module(tokens).logits / CONFIG.temperature
    logits = torch.gather(logits, 1, (at - 1)[..., None].expand(-1, -1, 11))
    picked = torch.gather(tokens, 1, at)[..., None]
    new = torch.gather(functional.log_softmax(logits, -1), 2, picked)[..., 0]
    entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
    old, ref = (new.detach() + torch.tensor(move) for move in moves)
    mask = (torch.arange(N) < torch.tensor(COUNTS)[:, None]).float()
    advantages = trl_advantages()[:, None]
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1 - CONFIG.clip, 1 + CONFIG.clip)
    policy = -torch.min(ratio * advantages, clipped * advantages)
    kl = torch.exp(ref - new) - (ref - new) - 1

    def mean(x):
        return ((x * mask).sum(-1) / mask.sum(-1)).mean()

    loss = mean(policy + CONFIG.beta * kl)
    loss.backward()

    rolled = Rollout(tokens_BT, PROMPTS, COUNTS, COUNTS > 0)
    batch = grpo.make_batch(
        CONFIG,
        rolled,
        (old.numpy(), None),
        ref.numpy(),
        jnp.array(REWARDS),
        CONFIG.beta,
    )

    @jax.jit
    def ours(params):
        objective = grpo.make_objective(model, CONFIG)
        total, metrics = objective(params, batch, Context(None, jnp.arange(B)))
        return total.mean(), {name: sums.mean() for name, sums in metrics.items()}

    (found, metrics), grads = jax.value_and_grad(ours, has_aux=True)(params)
    outside = mean((ratio != clipped).float()).item()
    expected = {
        "policy_loss": mean(policy).item(),
        "kl_loss": mean(kl).item(),
        "entropy": mean(entropy).item(),
        "clip_fraction": outside,
    }
    assert 0.1 < outside < 0.9
    assert found == pytest.approx(loss.item(), abs=1e-5)
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(number, abs=1e-5), name
    theirs = {n: p.grad for n, p in reference.module.named_parameters()}
    for name, grad in reference.tensors(grads).items():
        if theirs.get(name) is not None:
            np.testing.assert_allclose(grad, theirs[name], rtol=0, atol=1e-5)


def test_a_batch_has_each_prompt_as_a_group_with_keys_that_differ():
    texts = Sequences.join(np.full(1 + n % 5 * 10, n) for n in range(20))
    settings = GRPOConfig(group_size=4, max_new_tokens=2, minibatches=1)
    config = changed(TINY, model={"block_size": 64}, data={"batch_size": 12})
    config = replace(config, grpo=settings)
    source = training_source(Prompts(texts), config)
    seen = []
    for step in range(7):
        batch = source(step)
        first_P4 = batch.tokens_BP[:, 0].reshape(3, 4)
        assert (first_P4 == first_P4[:, :1]).all()
        assert len(set(map(tuple, batch.keys_B2))) == 12
        assert batch.tokens_BP.shape[1] == 48  # for prompts of 1 to 41 tokens
        seen += first_P4[:, 0].tolist()
        rows = source(step, slice(5, 9))  # as another process reads them
        np.testing.assert_array_equal(rows.tokens_BP, batch.tokens_BP[5:9])
        np.testing.assert_array_equal(rows.keys_B2, batch.keys_B2[5:9])
    assert set(seen) == {*range(20)}  # an epoch has every prompt
