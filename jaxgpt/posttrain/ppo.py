"""Proximal policy optimization with a divergence penalty, as in RLHF.

An iteration samples a response to each prompt (a rollout), scores it, and makes several
epochs of updates in minibatches. The value head reads the policy's own hidden states.

B responses of an iteration   N tokens of responses   T time   M minibatches

Source: Ziegler et al. 2019; Schulman et al. 2017 (PPO) and 2015 (GAE); Huang et al.
2024, "The N+ Implementation Details of RLHF with PPO".
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.config import PPOConfig
from jaxgpt.posttrain.rollout import Rollout, predict_responses, response_mask
from jaxgpt.training.objectives import Context, LossSum, Objective


class PPOBatch(NamedTuple):
    """Responses to learn from.

    Attributes:
      tokens_BT: the prompts, each followed by its response, padded on the right, i32.
      prompts_B: tokens in each prompt, i32.
      counts_B: tokens in each response, i32.
      log_probs_BN: of the response's tokens before the updates, in nats.
      values_BN: the value head's output before each of them, before the updates.
      advantages_BN: whitened.
      returns_BN: what the value head learns.
    """

    tokens_BT: Array
    prompts_B: Array
    counts_B: Array
    log_probs_BN: Array
    values_BN: Array
    advantages_BN: Array
    returns_BN: Array


def token_rewards(
    score_B: Array, kl_BN: Array, counts_B: Array, beta: Array | float
) -> Array:
    """The reward of each token: -beta KL, and on the last one also the score."""
    is_last_BN = jnp.arange(kl_BN.shape[1]) == counts_B[:, None] - 1
    return is_last_BN * score_B[:, None] - beta * kl_BN


def advantages(
    rewards_BN: Array, values_BN: Array, mask_BN: Array, gae_lambda: float
) -> Array:
    """Generalised advantage estimates without discount, f32 [B, N].

    The value past the end is 0. Source: Schulman et al. 2015, equation 16.
    """
    values_BN *= mask_BN
    next_BN = jnp.pad(values_BN[:, 1:], ((0, 0), (0, 1)))
    delta_BN = (rewards_BN + next_BN - values_BN) * mask_BN

    def add(later_B: Array, delta_B: Array) -> tuple[Array, Array]:
        advantage_B = delta_B + gae_lambda * later_B
        return advantage_B, advantage_B

    zeros_B = jnp.zeros_like(delta_BN[:, 0])
    _, found_NB = jax.lax.scan(add, zeros_B, delta_BN.T, reverse=True)
    return found_NB.T * mask_BN


def whiten(x_BN: Array, mask_BN: Array) -> Array:
    """Shifts and scales what the mask has to mean 0 and variance 1."""
    count = mask_BN.sum()
    mean = (x_BN * mask_BN).sum() / count
    variance = ((x_BN - mean) ** 2 * mask_BN).sum() / jnp.maximum(count - 1, 1)
    return (x_BN - mean) * jax.lax.rsqrt(variance + 1e-8) * mask_BN


def clipped_losses(
    log_probs_BN: Array, old_BN: Array, advantages_BN: Array, clip: float
) -> tuple[Array, Array]:
    """The clipped surrogate of each token, and its ratio to the old policy.

    Source: Schulman et al. 2017, equation 7.
    """
    ratio_BN = jnp.exp(log_probs_BN - old_BN)
    clipped_BN = jnp.clip(ratio_BN, 1 - clip, 1 + clip)
    gain_BN = jnp.minimum(ratio_BN * advantages_BN, clipped_BN * advantages_BN)
    return -gain_BN, ratio_BN


def value_losses(values_BN: Array, batch: PPOBatch, clip: float) -> Array:
    """Half the squared error of each value, or of the clipped one if that is larger."""
    old_BN, returns_BN = batch.values_BN, batch.returns_BN
    clipped_BN = jnp.clip(values_BN, old_BN - clip, old_BN + clip)
    error_BN = jnp.maximum(
        (values_BN - returns_BN) ** 2, (clipped_BN - returns_BN) ** 2
    )
    return error_BN / 2


def predict(
    model: nn.Module, config: PPOConfig, trained: Any, batch: Any
) -> tuple[Array, Array, Array]:
    """Log-probabilities, entropies and values of the responses, f32 [B, N] each."""
    log_probs_BN, entropy_BN, x_BNC = predict_responses(
        model,
        trained["policy"],
        batch.tokens_BT,
        batch.prompts_B,
        config.max_new_tokens,
        config.temperature,
    )
    head = trained["value"]
    return log_probs_BN, entropy_BN, x_BNC @ head["kernel"] + head["bias"]


def make_batch(
    config: PPOConfig,
    rolled: Rollout,
    old: tuple[Array, Array, Array],
    reference_BN: Array,
    reward_B: Array,
    beta: Array,
) -> PPOBatch:
    """Makes the batch of an iteration, from the result of `predict` before it."""
    log_probs_BN, _, values_BN = old
    mask_BN = response_mask(rolled.counts_B, config.max_new_tokens)
    kl_BN = (log_probs_BN - reference_BN) * mask_BN
    rewards_BN = token_rewards(reward_B, kl_BN, rolled.counts_B, beta)
    gained_BN = advantages(rewards_BN, values_BN, mask_BN, config.gae_lambda)
    return PPOBatch(
        rolled.tokens_BT,
        rolled.prompts_B,
        rolled.counts_B,
        log_probs_BN,
        values_BN,
        whiten(gained_BN, mask_BN),
        gained_BN + values_BN,
    )


def make_objective(model: nn.Module, config: PPOConfig) -> Objective:
    """Makes the objective of PPO, without dropout; the weight is the tokens.

    A batch is a `PPOBatch`. The parameters are {"policy": ..., "value": ...}, of which
    the value is a linear head.
    """

    def objective(
        params: Any, batch: PPOBatch, context: Context
    ) -> tuple[LossSum, dict[str, LossSum]]:
        log_probs_BN, entropy_BN, values_BN = predict(model, config, params, batch)
        mask_BN = response_mask(batch.counts_B, config.max_new_tokens)
        log_probs_BN = jnp.where(mask_BN > 0, log_probs_BN, batch.log_probs_BN)
        old_BN, advantages_BN = batch.log_probs_BN, batch.advantages_BN
        policy_BN, ratio_BN = clipped_losses(
            log_probs_BN, old_BN, advantages_BN, config.clip
        )
        value_BN = value_losses(values_BN, batch, config.value_clip)
        weight = mask_BN.sum()

        def mean(x_BN: Array) -> LossSum:
            return LossSum((x_BN * mask_BN).sum(), weight)

        loss = mean(policy_BN + config.value_coefficient * value_BN)
        return loss, {
            "policy_loss": mean(policy_BN),
            "value_loss": mean(value_BN),
            "entropy": mean(entropy_BN),
            "clip_fraction": mean(jnp.abs(ratio_BN - 1) > config.clip),
            "ratio_error": mean(jnp.abs(ratio_BN - 1)),
            "update_kl": mean(batch.log_probs_BN - log_probs_BN),
        }

    return objective


def on_prompts(model: nn.Module) -> Any:
    """Makes what only runs the policy on prompts, in place of an objective."""
    return lambda params, batch, _: model.apply({"params": params}, batch.tokens_BP)


def adapt(beta: Array, kl: Array, responses: int, config: PPOConfig) -> Array:
    """The coefficient of the next iteration, so that the divergence nears its target.

    It stays as it is if the divergence is not finite. Source: Ziegler et al. 2019,
    section 2.2.
    """
    if not config.kl_target:
        return beta
    error = jnp.clip(kl / config.kl_target - 1, -0.2, 0.2)
    error = jnp.where(jnp.isfinite(kl), error, 0)
    return beta * (1 + error * responses / config.kl_horizon)
