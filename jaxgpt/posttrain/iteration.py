"""One iteration of PPO: rollout, judgement, updates; and its evaluation.

B responses   N tokens of responses   M minibatches   K updates
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxgpt.config import Config, PPOConfig
from jaxgpt.parallel.defaults import train_jit_options, with_microbatches
from jaxgpt.parallel.mesh import batch_sharding, replicated
from jaxgpt.posttrain import ppo
from jaxgpt.posttrain.rollout import (
    Rollout,
    compiled,
    predict_responses,
    response_mask,
)
from jaxgpt.text.examples import PromptBatch
from jaxgpt.training.evaluation import EvalStep
from jaxgpt.training.objectives import LossSum
from jaxgpt.training.optimizer import run_optimizer
from jaxgpt.training.step import TrainState, make_train_step

# Largest |ratio - 1|, and divergence, before the first update: there is none but for
# rounding.
_TOLERANCE = 1e-4

# Maps a rollout to the reward of each response, f32 [B], before it is scaled.
Reward = Callable[[Rollout], Array]
# Maps a rollout to the reference's log-probabilities f32 [B, N], and rewards f32 [B].
Judge = Callable[[Rollout], tuple[Array, Array]]


def make_judge(
    model: nn.Module, config: PPOConfig, mesh: Mesh, reference: Any, reward: Reward
) -> Judge:
    """Makes the function that judges responses: by the reference, and by the reward.

    A response without an end loses `no_end_penalty`.

    Args:
      model: the policy's model.
      mesh: the devices of all arrays.
      reference: parameters that the policy is kept near to.
      reward: what is maximised; it is scaled as the config says.
    """

    def predict(params: Any, rolled: Rollout) -> Array:
        texts = rolled.tokens_BT, rolled.prompts_B, config.max_new_tokens
        return predict_responses(model, params, *texts, config.temperature)[0]

    log_probs = compiled(predict, mesh, batch_sharding(mesh))

    def judge(rolled: Rollout) -> tuple[Array, Array]:
        reward_B = (reward(rolled) - config.reward_mean) / config.reward_std
        reward_B -= config.no_end_penalty * ~rolled.ended_B
        return log_probs(reference, rolled), reward_B

    return judge


def make_update(
    model: nn.Module, config: Config, mesh: Mesh, state: TrainState
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Makes `update(state, rollout, reference_BN, reward_B) -> state, metrics`.

    Advantages, then all epochs of minibatches, as one program. It donates the buffers
    of the state.

    Args:
      model: the policy's model.
      config: the run's config.
      mesh: the run's mesh.
      state: the result of `abstract_state`, for its shardings.
    """
    settings = _settings(config)
    M, N = settings.minibatches, settings.max_new_tokens
    B, limit = config.data.batch_size, config.train.max_skipped_steps
    data = replace(config.data, batch_size=B // M, gradient_accumulation_steps=-1)
    inner = with_microbatches(replace(config, data=data), mesh)
    train_step = make_train_step(ppo.ppo(model, settings), run_optimizer(config), inner)

    def split(a: Array) -> Array:
        """Strided slices [M, B / M, ...], so that rows stay on their devices."""
        return a.reshape(B // M, M, *a.shape[1:]).swapaxes(0, 1)

    def update(
        state: TrainState, rolled: Rollout, reference_BN: Array, reward_B: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        beta = state.extra["beta"]
        trained = {"policy": state.params, "value": state.extra["value"]}
        predict = partial(ppo.predict, model, settings, trained)
        old = jax.lax.map(predict, jax.tree.map(split, rolled))
        log_probs_BN, entropy_BN, values_BN = jax.tree.map(
            lambda a: a.swapaxes(0, 1).reshape(B, N), old
        )
        mask_BN = response_mask(rolled.counts_B, N)
        kl_BN = (log_probs_BN - reference_BN) * mask_BN
        rewards_BN = ppo.token_rewards(reward_B, kl_BN, rolled.counts_B, beta)
        gained_BN = ppo.advantages(rewards_BN, values_BN, mask_BN, settings.gae_lambda)
        batch = ppo.PPOBatch(
            *(rolled.tokens_BT, rolled.prompts_B, rolled.counts_B),
            *(log_probs_BN, values_BN, ppo.whiten(gained_BN, mask_BN)),
            gained_BN + values_BN,
        )

        def step(carry: TrainState, row_B: Array) -> tuple[TrainState, Any]:
            rows = jax.tree.map(lambda a: a[row_B], batch)
            rows = jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))
            return train_step(carry, rows)

        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        orders = [
            jax.random.permutation(jax.random.fold_in(key, epoch), B)
            for epoch in range(settings.epochs)
        ]
        carry = replace(state, params=trained, extra=None)
        carry, steps = jax.lax.scan(
            step, carry, jnp.reshape(jnp.stack(orders), (-1, B // M))
        )
        tokens, kl = mask_BN.sum(), kl_BN.sum() / B
        metrics = {name: values.mean() for name, values in steps.items()} | {
            "first_ratio_error": steps["ratio_error"][0],
            "first_kl": jnp.abs(steps["update_kl"][0]),
            "learning_rate": steps["learning_rate"][-1],
            "skipped": carry.skipped,
            "tokens": tokens,
            "reward": reward_B.mean(),
            "kl": kl,
            "beta": beta,
            "entropy": (entropy_BN * mask_BN).sum() / tokens,
            "response_tokens": tokens / B,
            "ended": rolled.ended_B.mean(),
        }
        state = replace(
            carry,
            step=state.step + (carry.skipped <= limit),
            params=carry.params["policy"],
            extra={
                "value": carry.params["value"],
                "beta": ppo.adapt(beta, kl, B, settings),
            },
        )
        return state, metrics

    where = jax.tree.map(attrgetter("sharding"), state)
    options = train_jit_options(config, mesh)
    return compiled(update, mesh, (where, replicated(mesh)), **options)


def make_ppo_program(
    respond: Callable[[Any, PromptBatch], Rollout],
    judge: Judge,
    update: Callable[..., tuple[TrainState, dict[str, Array]]],
) -> Callable[[TrainState, PromptBatch], tuple[TrainState, dict[str, np.ndarray]]]:
    """Makes `iteration(state, prompts) -> state, metrics`, the train program of PPO.

    Metrics are [1], and tell how long each phase took. The prompts are of one
    iteration, with leaves [1, B, ...]. Raises ArithmeticError if the first minibatch
    finds other probabilities than the old policy's, which are its own.
    """

    def iteration(
        state: TrainState, prompts: PromptBatch
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        times = [time.monotonic()]

        def timed(result: Any) -> Any:
            jax.block_until_ready(result)
            times.append(time.monotonic())
            return result

        rolled = timed(respond(state.params, jax.tree.map(lambda a: a[0], prompts)))
        judged = timed(judge(rolled))
        state, metrics = timed(update(state, rolled, *judged))
        found = {name: float(value) for name, value in metrics.items()}
        seconds = np.diff(times).tolist()
        for name, value in zip(("rollout", "judge", "update"), seconds, strict=True):
            found[f"{name}_seconds"] = value
        for name in ("first_ratio_error", "first_kl"):
            if found[name] > _TOLERANCE:
                raise ArithmeticError(
                    f"{name} is {found[name]:.1e}, above {_TOLERANCE:.0e}, before the "
                    "first update of an iteration: the policy that sampled is not the "
                    "one that learns, which is a bug"
                )
        return state, {name: np.array([value]) for name, value in found.items()}

    return iteration


def make_ppo_eval_step(
    config: PPOConfig,
    respond: Callable[[Any, PromptBatch], Rollout],
    judge: Judge,
    policy_log_probs: Any,
) -> EvalStep:
    """Makes the `EvalStep` of -(reward - beta KL), with the config's beta.

    Its other metrics are means of the responses: `reward`, `kl` in nats, `ended` and
    `response_tokens`.
    """

    def eval_step(params: Any, batches: PromptBatch) -> dict[str, LossSum]:
        found = [
            of_batch(params, jax.tree.map(lambda a, n=n: a[n], batches))
            for n in range(len(batches.weights_B))
        ]
        return jax.tree.map(lambda *sums: np.sum(sums), *found)

    @jax.jit
    def sums(
        rolled: Rollout,
        policy_BN: Array,
        reference_BN: Array,
        reward_B: Array,
        weights_B: Array,
    ) -> dict[str, LossSum]:
        mask_BN = response_mask(rolled.counts_B, config.max_new_tokens)
        kl_B = ((policy_BN - reference_BN) * mask_BN).sum(axis=1)
        columns = {
            "loss": config.beta * kl_B - reward_B,
            "reward": reward_B,
            "kl": kl_B,
            "ended": rolled.ended_B,
            "response_tokens": rolled.counts_B,
        }
        count = weights_B.sum()
        return {
            name: LossSum((x_B * weights_B).sum(), count)
            for name, x_B in columns.items()
        }

    def of_batch(params: Any, prompts: PromptBatch) -> dict[str, LossSum]:
        rolled = respond(params, prompts)
        policy_BN = policy_log_probs(params, rolled)
        return jax.device_get(
            sums(rolled, policy_BN, *judge(rolled), prompts.weights_B)
        )

    return eval_step


def _settings(config: Config) -> PPOConfig:
    if config.ppo is None:
        raise TypeError("the config has no section ppo")
    return config.ppo
