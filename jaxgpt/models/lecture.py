"""The lecture's ladder of models, rung by rung.

B batch   T time   V vocab
"""

import flax.linen as nn
import jax

from jaxgpt.config import ModelConfig


class Bigram(nn.Module):
    """Each token predicts the next by a look into a table of logits [V, V].

    Source: the lecture's BigramLanguageModel; the table starts as PyTorch's N(0, 1).
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        deterministic: bool = True,
        rows_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the token after each position, f32 [B, T, V].

        Takes the arguments of `GPT.__call__`; there is no dropout to use the last two.
        """
        V = self.config.known_vocab_size()
        init = nn.initializers.normal(1.0)
        return nn.Embed(V, V, embedding_init=init, name="table")(tokens_BT)
