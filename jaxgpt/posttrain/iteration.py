"""One iteration of PPO or GRPO: rollout, judgement, updates; and its evaluation.

B responses   N tokens of responses   M minibatches   K updates
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxgpt.config import Config, RewardedConfig
from jaxgpt.exits import in_background
from jaxgpt.parallel.defaults import train_jit_options, with_microbatches
from jaxgpt.parallel.mesh import batch_sharding, replicated
from jaxgpt.posttrain import grpo, ppo
from jaxgpt.posttrain.rewards import Reward, decode_responses, make_reward, on_host
from jaxgpt.posttrain.rollout import (
    Program,
    Rollout,
    make_rollout,
    make_rules,
    predict_responses,
    respond,
    response_mask,
)
from jaxgpt.run import Run, load_initial_params, load_run, text_tokenizer
from jaxgpt.text.examples import PromptBatch, Prompts
from jaxgpt.training.checkpoint import digest
from jaxgpt.training.evaluation import EvalStep, read_examples
from jaxgpt.training.objectives import LossSum
from jaxgpt.training.optimizer import run_optimizer
from jaxgpt.training.step import TrainState, dropout_key, make_train_step

_SCALED_BY = 1024  # prompts whose responses scale the rewards
# Largest |ratio - 1|, and divergence, before the first update: there is none but for
# rounding.
_TOLERANCE = 1e-4

# Maps a rollout to the reference's log-probabilities f32 [B, N], and rewards f32 [B].
Judge = Callable[[Rollout], tuple[Array, Array]]
# Maps batches of prompts to a program: it maps a state and them to a state and metrics.
TrainProgram = Callable[[Any], Future[Any]]


def prepare_rewarded(
    model: nn.Module,
    config: Config,
    mesh: Mesh,
    state: TrainState,
    tokenizer: Any,
    prompts: Prompts,
    log: Callable[[str], None],
) -> tuple[Config, TrainProgram, EvalStep]:
    """Loads the reference and the reward; returns what trains and what evaluates.

    A response without an end loses `no_end_penalty`.

    Args:
      model: the policy's model.
      config: the run's config. The result has the digest of the reward model and the
        scale of its rewards, unless the config had them.
      mesh: the run's mesh.
      state: the result of `abstract_state`.
      tokenizer: the policy's and the reward model's.
      prompts: of training, whose responses by the reference give that scale.
      log: called with lines to show.

    Raises ValueError if the reward model has changed since the run began, or if it
    gives all responses the same reward.
    """
    settings: Any = config.rewarded
    reference = load_initial_params(config, mesh)
    sample = make_rollout(model, make_rules(settings, tokenizer), mesh)
    reward = make_reward(settings, tokenizer, mesh)
    if checkpoint := settings.reward_model:
        found = digest(Path(checkpoint))
        if not settings.reward_sha256:
            of_reference = partial(sample, reference)
            mean, std = _reward_scale(config, mesh, prompts, of_reference, reward)
            log(f"rewards before training: mean {mean:.4f}, std {std:.4f}; now 0 and 1")
            settings = replace(settings, reward_mean=mean, reward_std=std)
        elif settings.reward_sha256 != found:
            raise ValueError(
                f"the reward model has changed since the run began: {checkpoint} has "
                f"sha256 {found}, not {settings.reward_sha256}; restore it, or train a "
                "new run"
            )
        settings = replace(settings, reward_sha256=found)
    config = config.with_rewarded(settings)

    def predict(params: Any, rolled: Rollout) -> Array:
        texts = rolled.tokens_BT, rolled.prompts_B, settings.max_new_tokens
        return predict_responses(model, params, *texts, settings.temperature)[0]

    rows = batch_sharding(mesh)
    log_probs = Program(predict, mesh, rows)
    update = make_update(model, config, mesh, state)

    def judge(rolled: Rollout) -> tuple[Array, Array]:
        reward_B = (reward(rolled) - settings.reward_mean) / settings.reward_std
        reward_B -= settings.no_end_penalty * ~rolled.ended_B
        return log_probs(reference, rolled), jax.device_put(reward_B, rows)

    def compile_all(prompts: PromptBatch) -> Any:
        """Compiles the programs of an iteration."""
        rolled = sample.compile(state.params, prompts).out_info
        found_BN = log_probs.compile(state.params, rolled).out_info
        if isinstance(reward, Program):
            reward.compile(rolled)
        reward_B = jax.ShapeDtypeStruct(found_BN.shape[:1], np.float32, sharding=rows)
        update.compile(state, rolled, found_BN, reward_B)
        return make_iteration(sample, judge, update)

    programs: dict[Any, Future[Any]] = {}

    def train_program(prompts: PromptBatch) -> Future[Any]:
        """Compiles in the background, and only once for the same shapes."""
        shape = prompts.tokens_BP.shape
        if shape not in programs:
            programs[shape] = in_background(partial(compile_all, *_unstack(prompts)))
        return programs[shape]

    eval_step = make_policy_eval_step(settings, mesh, sample, judge, log_probs)
    return config, train_program, eval_step


def _reward_scale(
    config: Config, mesh: Mesh, prompts: Prompts, sample: Any, reward: Reward
) -> tuple[float, float]:
    """Mean and standard deviation of rewards of responses to up to 1,024 prompts."""
    rng, found = np.random.default_rng(config.train.seed), list[np.ndarray]()
    keep_N = rng.permutation(len(prompts)) < _SCALED_BY
    chosen = Prompts(prompts.prompts.select(keep_N))
    for _, batches in read_examples(chosen, config, mesh):
        for batch in _unstack(batches):
            weights_B = on_host(batch.weights_B)
            found.append(on_host(reward(sample(batch)))[weights_B > 0])
    rewards = np.concatenate(found)
    if not 0 < rewards.std() < math.inf:
        raise ValueError(
            f"the reward model gives {len(rewards)} responses rewards of standard "
            f"deviation {rewards.std()}, which can't be scaled to 1; use another"
        )
    return float(rewards.mean()), float(rewards.std())


def _unstack(batches: PromptBatch) -> list[PromptBatch]:
    """The batches of a dispatch."""
    count = len(batches.weights_B)
    return [jax.tree.map(lambda a, n=n: a[n], batches) for n in range(count)]


def make_update(
    model: nn.Module, config: Config, mesh: Mesh, state: TrainState
) -> Program:
    """Makes `update(state, rollout, reference_BN, reward_B) -> state, metrics`.

    Advantages, then all epochs of minibatches, as one program. It donates the buffers
    of the state. The metric `reward` is the mean of the given rewards: scaled, and less
    the penalty for a response without an end. Of GRPO, `equal_groups` is the fraction
    of the groups with equal rewards, from which nothing is learned.

    Args:
      model: the policy's model.
      config: the run's config.
      mesh: the run's mesh.
      state: the result of `abstract_state`, for its shardings.
    """
    settings: Any = config.rewarded
    M, N = settings.minibatches, settings.max_new_tokens
    B, limit = config.data.batch_size, config.train.max_skipped_steps
    data = replace(config.data, batch_size=B // M)
    inner = with_microbatches(replace(config, data=data, ppo=None, grpo=None), mesh)
    method: Any = ppo if config.ppo else grpo
    objective = method.make_objective(model, settings)
    train_step = make_train_step(objective, run_optimizer(config), inner)

    def split(a: Array) -> Array:
        """Strided slices [M, B / M, ...], so that rows stay on their devices."""
        return a.reshape(B // M, M, *a.shape[1:]).swapaxes(0, 1)

    def update(
        state: TrainState, rolled: Rollout, reference_BN: Array, reward_B: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        trained, beta = state.params, jnp.float32(settings.beta)
        if config.ppo:
            trained = {"policy": state.params, "value": state.extra["value"]}
            beta = state.extra["beta"]
        predict = partial(method.predict, model, settings, trained)
        old = jax.lax.map(predict, jax.tree.map(split, rolled))
        old = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(B, N), old)
        batch = method.make_batch(settings, rolled, old, reference_BN, reward_B, beta)
        log_probs_BN, entropy_BN = old[:2]
        mask_BN = response_mask(rolled.counts_B, N)
        kl_BN = (log_probs_BN - reference_BN) * mask_BN

        def step(carry: TrainState, row_B: Array) -> tuple[TrainState, Any]:
            rows = jax.tree.map(lambda a: a[row_B], batch)
            rows = jax.lax.with_sharding_constraint(rows, batch_sharding(mesh))
            return train_step(carry, rows)

        key_E = jax.random.split(dropout_key(config, state.step), settings.epochs)
        order_EB = jax.vmap(partial(jax.random.permutation, x=B))(key_E)
        carry = replace(state, params=trained, extra=None)
        carry, steps = jax.lax.scan(step, carry, order_EB.reshape(-1, B // M))
        tokens, kl = mask_BN.sum(), kl_BN.sum() / B
        weigh = partial(jnp.average, weights=steps["tokens"])
        metrics = {name: weigh(values) for name, values in steps.items()} | {
            "first_ratio_error": steps["ratio_error"][0],
            "first_kl": jnp.abs(steps["update_kl"][0]),
            "learning_rate": steps["learning_rate"][-1],
            "skipped": carry.skipped,
            "tokens": tokens,
            "loss": settings.beta * kl - reward_B.mean(),
            "reward": reward_B.mean(),
            "kl": kl,
            "beta": beta,
            "entropy": (entropy_BN * mask_BN).sum() / tokens,
            "response_tokens": tokens / B,
            "ended": rolled.ended_B.mean(),
        }
        counts = carry.skipped <= limit
        params, extra = carry.params, None
        if config.ppo:
            next_beta = jnp.where(counts, ppo.adapt(beta, kl, B, config.ppo), beta)
            extra = {"value": params["value"], "beta": next_beta}
            params = params["policy"]
        if config.grpo:
            groups_PG = batch.advantages_B.reshape(-1, config.grpo.group_size)
            metrics["equal_groups"] = (~groups_PG.any(axis=1)).mean()
        steps_done = state.step + counts
        return replace(carry, step=steps_done, params=params, extra=extra), metrics

    where = jax.tree.map(attrgetter("sharding"), state)
    options = train_jit_options(config, mesh)
    return Program(update, mesh, (where, replicated(mesh)), **options)


def make_iteration(
    sample: Program, judge: Judge, update: Program
) -> Callable[..., tuple[TrainState, dict[str, np.ndarray]]]:
    """Makes `iteration(state, prompts) -> state, metrics`, the train program.

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

        rolled = timed(sample(state.params, *_unstack(prompts)))
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


def make_policy_eval_step(
    config: RewardedConfig,
    mesh: Mesh,
    sample: Program,
    judge: Judge,
    log_probs: Program,
) -> EvalStep:
    """Makes the `EvalStep` of -(reward - beta KL), with the config's beta.

    Its other metrics are means of the responses: `reward`, scaled and less the penalty
    for a response without an end; `kl` in nats, `ended` and `response_tokens`.
    """

    def eval_step(params: Any, batches: PromptBatch) -> dict[str, LossSum]:
        found = [of_batch(params, batch) for batch in _unstack(batches)]
        return jax.tree.map(lambda *sums: np.sum(sums), *found)

    def sums(
        rolled: Rollout, policy_BN: Array, judged: tuple[Array, Array], weights_B: Array
    ) -> dict[str, LossSum]:
        reference_BN, reward_B = judged
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
        rolled = sample(params, prompts)
        found = log_probs(params, rolled), judge(rolled), prompts.weights_B
        return jax.device_get(total(rolled, *found))

    total = Program(sums, mesh, replicated(mesh))
    return eval_step


def before_and_after(
    run: Run, prompts: Prompts, count: int
) -> list[tuple[str, str, str]]:
    """The first prompts, each with a response before and one after the run's training.

    Both are drawn with the same keys.
    """
    settings: Any = run.config.rewarded
    checkpoint = Path(run.config.train.init_from)
    initial = load_run(checkpoint.parent.parent, checkpoint.name)
    tokenizer, first = text_tokenizer(run), range(min(count, len(prompts)))
    given = [prompts.prompts[i] for i in first], make_rules(settings, tokenizer), 1337
    texts, (_, after) = (
        decode_responses(respond(each, *given), tokenizer) for each in (initial, run)
    )
    return list(zip(*texts, after, strict=True))
