"""Group relative policy optimization: each response is compared with its group.

A group is several responses to the same prompt. There is no value head: a response's
advantage is how far its reward is above the mean of its group, for all of its tokens.

B responses, whose groups follow each other   G responses of a group   N tokens

Source: Shao et al. 2024 (DeepSeekMath), section 4.1.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt.config import GRPOConfig
from jaxgpt.posttrain.ppo import clipped_losses
from jaxgpt.posttrain.rollout import Rollout, predict_responses, response_mask
from jaxgpt.training.objectives import Context, LossSum, Objective


class GRPOBatch(NamedTuple):
    """Responses to learn from.

    Attributes:
      tokens_BT: the prompts, each followed by its response, padded on the right, i32.
      prompts_B: tokens in each prompt, i32.
      counts_B: tokens in each response, i32.
      log_probs_BN: of the response's tokens before the updates, in nats.
      reference_BN: of the same under the reference.
      advantages_B: f32.
    """

    tokens_BT: Array
    prompts_B: Array
    counts_B: Array
    log_probs_BN: Array
    reference_BN: Array
    advantages_B: Array


def group_advantages(reward_B: Array, group_size: int) -> Array:
    """(r - mean) / std of each group, f32 [B]; 0 where all rewards are the same."""
    reward_PG = reward_B.reshape(-1, group_size)
    above_PG = reward_PG - reward_PG.mean(axis=1, keepdims=True)
    std_P1 = reward_PG.std(axis=1, ddof=min(group_size - 1, 1), keepdims=True)
    return (above_PG / (std_P1 + 1e-4)).reshape(-1)


def divergences(log_probs_BN: Array, reference_BN: Array) -> Array:
    """An estimate of KL(policy || reference) at each token, at least 0.

    Source: Schulman 2020, "Approximating KL divergence", k3.
    """
    log_ratio_BN = reference_BN - log_probs_BN
    return jnp.exp(log_ratio_BN) - log_ratio_BN - 1


def predict(
    model: nn.Module, config: GRPOConfig, params: Any, batch: Any
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of the responses, f32 [B, N] each."""
    texts = batch.tokens_BT, batch.prompts_B, config.max_new_tokens
    return predict_responses(model, params, *texts, config.temperature)[:2]


def make_batch(
    config: GRPOConfig,
    rolled: Rollout,
    old: tuple[Array, Array],
    reference_BN: Array,
    reward_B: Array,
    beta: Any,
) -> GRPOBatch:
    """Makes the batch of an iteration, from the result of `predict` before it."""
    rows, (log_probs_BN, _) = (rolled.tokens_BT, rolled.prompts_B, rolled.counts_B), old
    advantages_B = group_advantages(reward_B, config.group_size)
    return GRPOBatch(*rows, log_probs_BN, reference_BN, advantages_B)


def make_objective(model: nn.Module, config: GRPOConfig) -> Objective:
    """Makes the objective of GRPO, without dropout; the weight is the responses.

    The loss is a mean of each response's tokens, and then of responses. A batch is a
    `GRPOBatch`.
    """

    def objective(
        params: Any, batch: GRPOBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        log_probs_BN, entropy_BN = predict(model, config, params, batch)
        mask_BN = response_mask(batch.counts_B, config.max_new_tokens)
        log_probs_BN = jnp.where(mask_BN > 0, log_probs_BN, batch.log_probs_BN)
        advantages_BN = batch.advantages_B[:, None]
        policy_BN, ratio_BN = clipped_losses(
            log_probs_BN, batch.log_probs_BN, advantages_BN, config.clip
        )
        kl_BN = divergences(log_probs_BN, batch.reference_BN)

        def mean(x_BN: Array) -> LossSum:
            x_B = jnp.where(mask_BN > 0, x_BN, 0).sum(axis=1)
            x_B /= jnp.maximum(batch.counts_B, 1)
            return LossSum(x_B.sum(), jnp.float32(len(x_B)))

        return mean(policy_BN + config.beta * kl_BN), {
            "policy_loss": mean(policy_BN),
            "kl_loss": mean(kl_BN),
            "entropy": mean(entropy_BN),
            "clip_fraction": mean(jnp.abs(ratio_BN - 1) > config.clip),
            "ratio_error": mean(jnp.abs(ratio_BN - 1)),
            "update_kl": mean(batch.log_probs_BN - log_probs_BN),
        }

    return objective
