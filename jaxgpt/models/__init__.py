"""The models: token ids to logits."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.models.gpt import GPT
from jaxgpt.models.lecture import BLOCKS, Bigram, LectureGPT


def build_model(config: ModelConfig) -> nn.Module:
    """The model that `config` describes, without parameters."""
    ladder = dict.fromkeys(BLOCKS, LectureGPT)
    models = {"gpt": GPT, "bigram": Bigram, **ladder}
    return models[config.architecture](config)


def crop_block_size(params: Any, block_size: int) -> Any:
    """The parameters with the first `block_size` position embeddings only.

    Source: nanoGPT model.py, crop_block_size.
    """
    cropped = dict(params)
    for name in ("wpe", "position_embedding"):
        if name in params:
            table = params[name]["embedding"]
            cropped[name] = {"embedding": table[:block_size]}
    return cropped


def parameter_shapes(config: ModelConfig) -> Any:
    """Shapes and dtypes of the model's parameters, without their memory."""
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = build_model(config).init
    return jax.eval_shape(init, jax.random.key(0), tokens_BT)["params"]
