"""The encoder-decoder: a GPT whose blocks also attend to an encoder's output.

B batch   T time   S source time   C n_embd   V vocab

Source: "Attention Is All You Need" (Vaswani et al. 2017), with pre-norm blocks and
learned positions; embeddings of source, target and head are shared.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxgpt.config import Seq2SeqConfig
from jaxgpt.models import layers
from jaxgpt.models.encoder import Encoder
from jaxgpt.models.gpt import GPT


class Seq2Seq(GPT):
    """Maps a source and the target so far to logits of the target's next tokens."""

    config: Seq2SeqConfig

    def setup(self) -> None:
        super().setup()
        self.encoder = Encoder(self.config, self.platform, self.wte)

    def hidden(  # type: ignore[override] # needs a source
        self,
        tokens_BT: Array,
        deterministic: bool = True,
        rows_B: Array | None = None,
        *,
        source_BS: Array,
        lengths_B: Array | None = None,
    ) -> Array:
        """The input of the head, [B, T, C].

        Args:
          tokens_BT: the target's token ids, i32, each of which predicts the next.
            Padding on the right needs no mask, since no earlier token attends to it.
          deterministic, rows_B: as for `GPT.hidden`.
          source_BS: the source's token ids, i32.
          lengths_B: tokens in each source before the right padding, i32; S if None.
        """
        rows_B = layers.dropout_rows(rows_B, len(tokens_BT), deterministic)
        memory = self._encode(source_BS, lengths_B, rows_B)
        return super().hidden(tokens_BT, deterministic, rows_B, memory=memory)

    def encode(
        self, source_BS: Array, lengths_B: Array | None = None
    ) -> tuple[layers.Memory, ...]:
        """Runs the encoder; the memory of each layer for `next_token_logits`.

        params["h"] must be a tuple of the parameters of the decoder's blocks.
        """
        encoded = self._encode(source_BS, lengths_B, None)
        attention = layers.Attention(self.config, self.platform, parent=None)
        project = partial(attention.apply, method="keys_and_values")

        def memory(params: Any) -> layers.Memory:
            kv: Any = project({"params": params["cross_attn"]}, encoded.states)
            return layers.Memory(kv, encoded.lengths_B)

        return tuple(map(memory, self.variables["params"]["h"]))

    def _encode(
        self, source_BS: Array, lengths_B: Array | None, rows_B: Array | None
    ) -> layers.Memory:
        if self.config.hide_source:
            source_BS, lengths_B = jnp.zeros_like(source_BS[:, :1]), None
        states_BSC = self.encoder(source_BS, lengths_B, rows_B)
        return layers.Memory(states_BSC, lengths_B)
