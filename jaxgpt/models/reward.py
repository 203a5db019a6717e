"""The reward model: a GPT whose head gives a text one number.

B batch   T time   C n_embd
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt.models.gpt import GPT
from jaxgpt.models.layers import take


class RewardModel(GPT):
    """Maps texts to rewards, which only differ meaningfully from each other.

    Source: Ziegler et al. 2019, section 2.1; its head begins as N(0, 1/(C + 1)).
    """

    def setup(self) -> None:
        super().setup()
        std = (self.config.n_embd + 1) ** -0.5
        self.reward = nn.Dense(1, kernel_init=nn.initializers.normal(std))

    def __call__(
        self, tokens_BT: Array, lengths_B: Array | None = None, **options: Any
    ) -> Array:
        """The reward of each text, f32 [B], read at its last token.

        Args:
          tokens_BT: token ids, i32, padded on the right.
          lengths_B: tokens in each row before the padding, i32; all T by default.
          options: further arguments of `GPT.hidden`.
        """
        x_BTC = self.hidden(tokens_BT, **options)
        last_BC = x_BTC[:, -1]
        if lengths_B is not None:
            last_BC = take(x_BTC, lengths_B - 1)[:, 0]
        return self.reward(last_BC.astype(jnp.float32))[:, 0]
