"""The models, which map token ids to logits."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import (
    BigramConfig,
    ClassifierConfig,
    GPTConfig,
    LectureConfig,
    MaskedLMConfig,
    ModelConfig,
    RewardConfig,
    Seq2SeqConfig,
)
from jaxgpt.models.encoder import Classifier, MaskedLM
from jaxgpt.models.gpt import GPT
from jaxgpt.models.lecture import Bigram, LectureGPT
from jaxgpt.models.reward import RewardModel
from jaxgpt.models.seq2seq import Seq2Seq


def build_model(config: ModelConfig, platform: str) -> nn.Module:
    """Builds a config's model, without parameters; `platform` is as in `jaxgpt.ops`."""
    match config:
        case GPTConfig():
            return GPT(config, platform)
        case RewardConfig():
            return RewardModel(config, platform)
        case ClassifierConfig():
            return Classifier(config, platform)
        case MaskedLMConfig():
            return MaskedLM(config, platform)
        case Seq2SeqConfig():
            return Seq2Seq(config, platform)
        case LectureConfig():
            return LectureGPT(config)
        case BigramConfig():
            return Bigram(config)
    raise TypeError(f"there is no model of a {type(config).__name__}")


def input_shapes(config: ModelConfig, T: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arguments that a config's model needs, for one row of T tokens."""
    tokens_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)
    if config.task == "translation":
        return {"tokens_BT": tokens_BT, "source_BS": tokens_BT}
    return {"tokens_BT": tokens_BT}


@cache  # because they are needed several times at startup
def parameter_shapes(config: ModelConfig) -> Any:
    """Shapes and dtypes of the model's parameters, without allocating memory."""
    init = build_model(config, "cpu").init  # the same on every platform
    return jax.eval_shape(init, jax.random.key(0), **input_shapes(config, 1))["params"]
