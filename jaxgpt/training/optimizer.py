"""AdamW with warmup, cosine decay and gradient clipping: nanoGPT's, in optax."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxgpt.config import Config, OptimizerConfig

_NOT_DECAYED = ("bias", "scale")


def learning_rate_schedule(config: OptimizerConfig, max_steps: int) -> optax.Schedule:
    """Linear warmup, then cosine decay from learning_rate to min_lr at max_steps.

    Maps completed updates to the next learning rate. Source: nanoGPT train.py, get_lr.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(max_steps, config.warmup_steps + 1),
        end_value=config.min_lr,
    )


def decay_mask(params: Any) -> Any:
    """True for matrices and embeddings, False for biases and LayerNorm scales.

    Decided by name, since stacking the layers gives all parameters an extra axis.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key not in _NOT_DECAYED, params
    )


class Optimizer(NamedTuple):
    """An `optax.GradientTransformation` that also reports its learning rate.

    Attributes:
      init: maps parameters to the optimizer's state.
      update: maps gradients, state and parameters to updates and the new state.
      learning_rate: maps the state to the learning rate of the next update.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[optax.OptState], Any]


def make_optimizer(config: OptimizerConfig, max_steps: int) -> Optimizer:
    """Gradient clipping, then scheduled AdamW. Source: torch.optim.AdamW."""
    schedule = learning_rate_schedule(config, max_steps)
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    clip = optax.clip_by_global_norm(config.grad_clip)
    init, update = optax.chain(clip if config.grad_clip else optax.identity(), adamw)

    def learning_rate(state: optax.OptState) -> Any:
        return schedule(optax.tree.get(state, "ScaleByScheduleState").count)

    return Optimizer(init, update, learning_rate)


def run_optimizer(config: Config) -> Optimizer:
    """The optimizer of a run, of which an iteration of PPO or GRPO is many updates."""
    optimizer, count = config.optimizer, 1
    if config.rewarded:
        count = config.rewarded.epochs * config.rewarded.minibatches
        warmup_steps = optimizer.warmup_steps * count
        optimizer = dataclasses.replace(optimizer, warmup_steps=warmup_steps)
    return make_optimizer(optimizer, config.train.max_steps * count)
