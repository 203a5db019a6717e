"""The decoder-only GPT: GPT-2's and nanoGPT's model.

B batch   T time   C n_embd   V vocab   L layers
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig
from jaxgpt.models.cache import KVCache
from jaxgpt.models.layers import (
    INIT_STD,
    RESIDUAL,
    Block,
    Dropout,
    check_length,
    constrain,
    dropout_rows,
    layer_norm,
)

KV = tuple[jax.Array, jax.Array]  # keys and values


class GPT(nn.Module):
    """Token ids to logits of each next token.

    The blocks' parameters are stacked along a leading axis of n_layer, and the blocks
    run as one scan, so that a deep model compiles as fast as a shallow one.

    Source: nanoGPT model.py; GPT-2, "Language Models are Unsupervised Multitask
    Learners", section 2.3.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        init = nn.initializers.normal(INIT_STD)
        self.wte = nn.Embed(
            config.known_vocab_size(), config.n_embd, dtype=dtype, embedding_init=init
        )
        self.wpe = nn.Embed(
            config.block_size, config.n_embd, dtype=dtype, embedding_init=init
        )
        self.drop = Dropout(config.dropout)
        self.h = Block(config)
        self.ln_f = layer_norm(config)

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        deterministic: bool = True,
        rows_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the token after each position, f32 [B, T, V].

        Args:
          tokens_BT: token ids, i32, T at most block_size.
          deterministic: False applies dropout, which needs rngs={"dropout": key}.
          rows_B: numbers of the rows in the whole batch, which key their dropout masks;
            0 to B - 1 if left out.

        Raises ValueError if T is above block_size.
        """
        B, T = tokens_BT.shape
        check_length(T, self.config)
        rows_B = dropout_rows(B, deterministic, rows_B)

        def body(block: Block, x_BTC: jax.Array) -> tuple[jax.Array, None]:
            return constrain(block(x_BTC, rows_B), RESIDUAL), None

        if self.config.remat:
            body = nn.remat(body, prevent_cse=False)
        x_BTC = self.wte(tokens_BT) + self.wpe(jnp.arange(T))
        x_BTC = constrain(self.drop(x_BTC, rows_B), RESIDUAL)
        x_BTC, _ = self._over_layers(body)(self.h, x_BTC)
        return constrain(self._head(x_BTC), ("batch", "time", "vocab"))

    def decode(
        self, tokens_BT: jax.Array, count_B: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Reads the next tokens of each row, with the earlier ones in the cache.

        Args:
          tokens_BT: token ids, i32; the first count_B of each row are read.
          count_B: i32, from 1 to T.
          cache: with room for T more positions in every row.

        Returns the logits of the token that follows each row, f32 [B, V], and the cache
        with the tokens read. Raises ValueError if T is above block_size.
        """
        T = tokens_BT.shape[1]
        check_length(T, self.config)
        start_B = cache.length_B

        def body(block: Block, x_BTC: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
            x_BTC, k_BSHD, v_BSHD = block.decode(x_BTC, start_B, *kv)
            return x_BTC, (k_BSHD, v_BSHD)

        position_BT = start_B[:, None] + jnp.arange(T)
        # Padding may stand past the last position; any embedding will do for it.
        position_BT = jnp.minimum(position_BT, self.config.block_size - 1)
        x_BTC = self.wte(tokens_BT) + self.wpe(position_BT)
        x_BTC, (keys_LBSHD, values_LBSHD) = self._over_layers(body)(
            self.h, x_BTC, (cache.keys_LBSHD, cache.values_LBSHD)
        )
        last_B1C = jnp.take_along_axis(x_BTC, count_B[:, None, None] - 1, axis=1)
        logits_BV = self._head(last_B1C)[:, 0]
        return logits_BV, KVCache(keys_LBSHD, values_LBSHD, start_B + count_B)

    def _over_layers(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.n_layer,
        )

    def _head(self, x_BTC: jax.Array) -> jax.Array:
        """Final LayerNorm and the head, whose weights are the token embedding's."""
        x_BTC = self.ln_f(x_BTC)
        return jnp.einsum(
            "BTC,VC->BTV",
            x_BTC,
            self.wte.embedding.astype(x_BTC.dtype),
            preferred_element_type=jnp.float32,
        )
