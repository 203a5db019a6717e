"""The models, which map token ids to logits."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import BigramConfig, GPTConfig, LectureConfig, ModelConfig
from jaxgpt.models.gpt import GPT
from jaxgpt.models.lecture import Bigram, LectureGPT


def build_model(config: ModelConfig, platform: str) -> nn.Module:
    """Builds a config's model, without parameters; `platform` is as in `jaxgpt.ops`."""
    match config:
        case GPTConfig():
            return GPT(config, platform)
        case LectureConfig():
            return LectureGPT(config)
        case BigramConfig():
            return Bigram(config)
    raise TypeError(f"there is no model of a {type(config).__name__}")


@cache  # because they are needed several times at startup
def parameter_shapes(config: ModelConfig) -> Any:
    """Shapes and dtypes of the model's parameters, without allocating memory."""
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = build_model(config, "cpu").init  # the same on every platform
    return jax.eval_shape(init, jax.random.key(0), tokens_BT)["params"]
