"""One update of PPO, against TRL's formulas in PyTorch on the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, random_params
from torch.nn import functional

from jaxgpt.config import PPOConfig
from jaxgpt.interop.torch_models import torch_of_params
from jaxgpt.models import build_model
from jaxgpt.posttrain import ppo
from jaxgpt.posttrain.rollout import response_mask
from jaxgpt.training.objectives import Context

CONFIG = PPOConfig(
    max_new_tokens=4, temperature=0.7, clip=0.2, value_clip=0.1, value_coefficient=0.3
)
COUNTS = np.array([4, 1, 3, 2, 4, 4], np.int32)
PROMPTS = np.array([3, 4, 1, 2, 2, 4], np.int32)
B, N, T = 6, 4, 8


@pytest.fixture(scope="module")
def numbers():
    """Random texts, what an old policy said of them, and their scores."""
    rng = np.random.default_rng(0)
    names = "old", "reference", "values"
    found = {name: rng.normal(-1, 0.5, (B, N)).astype(np.float32) for name in names}
    tokens = rng.integers(11, size=(B, T)).astype(np.int32)
    return {**found, "tokens": tokens, "scores": rng.normal(size=B).astype(np.float32)}


def estimates(numbers):
    """Ours: rewards, advantages, whitened advantages and returns."""
    mask_BN = response_mask(COUNTS, N)
    kl_BN = (numbers["old"] - numbers["reference"]) * mask_BN
    rewards_BN = ppo.token_rewards(numbers["scores"], kl_BN, COUNTS, 0.15)
    gained_BN = ppo.advantages(rewards_BN, jnp.array(numbers["values"]), mask_BN, 0.9)
    returns_BN = gained_BN + numbers["values"]
    return rewards_BN, gained_BN, ppo.whiten(gained_BN, mask_BN), returns_BN


def trl_estimates(numbers):
    """TRL's, as its PPOTrainer computes them."""
    old, reference, values, scores = (
        torch.tensor(numbers[name]) for name in ("old", "reference", "values", "scores")
    )
    ends = torch.tensor(COUNTS).long() - 1
    padding = torch.arange(N) > ends[:, None]
    values = values.masked_fill(padding, 0)
    rewards = (-0.15 * (old - reference)).masked_fill(padding, 0)
    rewards[torch.arange(B), ends] += scores
    last, reversed_ = torch.zeros(B), []
    for t in reversed(range(N)):
        following = values[:, t + 1] if t < N - 1 else 0.0
        delta = rewards[:, t] + 1.0 * following - values[:, t]
        last = delta + 1.0 * 0.9 * last
        reversed_.append(last)
    gained = torch.stack(reversed_[::-1], dim=1)
    kept = gained[~padding]
    variance = ((kept - kept.mean()) ** 2).mean() * len(kept) / (len(kept) - 1)
    whitened = (gained - kept.mean()) * torch.rsqrt(variance + 1e-8)
    return rewards, gained, whitened.masked_fill(padding, 0), gained + values, ~padding


def test_rewards_advantages_and_returns_are_those_of_trl(numbers):
    *expected, mask = trl_estimates(numbers)
    for ours, theirs in zip(estimates(numbers), expected, strict=True):
        kept = mask.numpy()
        np.testing.assert_allclose(
            np.asarray(ours)[kept], theirs.numpy()[kept], rtol=0, atol=1e-5
        )


def test_losses_gradients_and_entropy_are_those_of_trl(numbers):
    model = build_model(TINY.model, "cpu")
    policy = random_params(model, mean=0.0, std=0.2)
    rng = np.random.default_rng(2)
    value = {"kernel": rng.normal(size=16).astype(np.float32), "bias": np.float32(0.3)}
    params = {"policy": policy, "value": value}
    context = Context(None, jnp.arange(B))
    *_, whitened, returns, mask = trl_estimates(numbers)

    # PyTorch: log-probabilities, entropies and values of the response's tokens.
    reference = torch_of_params(TINY.model, policy)
    reference.module.eval()
    kernel, bias = (torch.tensor(value[n], requires_grad=True) for n in value)
    tokens = torch.tensor(numbers["tokens"]).long()
    at = (torch.tensor(PROMPTS).long()[:, None] + torch.arange(N)).clamp(max=T - 1)
    hidden = reference.module.transformer(tokens).last_hidden_state
    hidden = torch.gather(hidden, 1, (at - 1)[..., None].expand(-1, -1, 16))
    logits = reference.module.lm_head(hidden) / CONFIG.temperature
    picked = torch.gather(tokens, 1, at)[..., None]
    new = torch.gather(functional.log_softmax(logits, -1), 2, picked)[..., 0]
    entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
    predicted = hidden @ kernel + bias
    # The old policy is near the new one, so that some ratios are clipped, not all.
    moved = 0.3 * torch.tensor(numbers["old"] - numbers["old"].mean())
    old, values = new.detach() - moved, torch.tensor(numbers["values"])
    ratio = torch.exp(new - old)
    clipped = torch.clamp(ratio, 1 - CONFIG.clip, 1 + CONFIG.clip)
    policy_loss = torch.max(-whitened * ratio, -whitened * clipped)[mask].mean()
    near = torch.clamp(
        predicted, values - CONFIG.value_clip, values + CONFIG.value_clip
    )
    errors = torch.max((predicted - returns) ** 2, (near - returns) ** 2)
    value_loss = 0.5 * errors[mask].mean()
    loss = policy_loss + CONFIG.value_coefficient * value_loss
    loss.backward()
    outside = (ratio != clipped)[mask].float().mean()
    assert 0.1 < outside < 0.9
    assert 0 < (near != predicted)[mask].float().mean() < 1

    batch = ppo.PPOBatch(
        *(numbers["tokens"], PROMPTS, COUNTS, old.numpy(), numbers["values"]),
        *(whitened.numpy(), returns.numpy()),
    )

    @jax.jit
    def ours(params):
        total, metrics = ppo.make_objective(model, CONFIG)(params, batch, context)
        return total.mean(), {name: sums.mean() for name, sums in metrics.items()}

    (found, metrics), grads = jax.value_and_grad(ours, has_aux=True)(params)
    expected = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy[mask].mean(),
        "clip_fraction": outside,
    }
    assert found == pytest.approx(loss.item(), abs=1e-5)
    for name, number in expected.items():
        assert metrics[name] == pytest.approx(number.item(), abs=1e-5), name
    theirs = {n: p.grad for n, p in reference.module.named_parameters()}
    for name, grad in reference.tensors(grads["policy"]).items():
        if theirs.get(name) is not None:
            np.testing.assert_allclose(grad, theirs[name], rtol=0, atol=1e-5)
    np.testing.assert_allclose(grads["value"]["kernel"], kernel.grad, rtol=0, atol=1e-5)
    np.testing.assert_allclose(grads["value"]["bias"], bias.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.6, 1.01), (60, 1.02), (0, 0.98), (np.nan, 1), (np.inf, 1)]
)
def test_beta_adapts_by_at_most_a_fifth_per_horizon(kl, expected):
    """Ziegler et al. 2019: beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)."""
    config = PPOConfig(beta=0.1, kl_target=6.0, kl_horizon=1000)
    found = ppo.adapt(jnp.float32(0.1), jnp.float32(kl), 100, config)
    assert found == pytest.approx(0.1 * expected, rel=1e-5)
    assert ppo.adapt(0.1, kl, 100, PPOConfig()) == 0.1
