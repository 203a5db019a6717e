"""The models: token ids to logits."""

import flax.linen as nn

from jaxgpt.config import ModelConfig
from jaxgpt.models.gpt import GPT
from jaxgpt.models.lecture import Bigram


def build_model(config: ModelConfig) -> nn.Module:
    """The model that `config` describes, without parameters."""
    return {"gpt": GPT, "bigram": Bigram}[config.architecture](config)
