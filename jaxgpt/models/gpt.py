"""The decoder-only GPT, as in GPT-2 and nanoGPT.

B batch   T time   C n_embd   V vocab
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt import ops
from jaxgpt.config import BlockConfig
from jaxgpt.models import layers
from jaxgpt.ops.attention import KV, Mask


class GPT(nn.Module):
    """Maps token ids to logits of each next token.

    Source: nanoGPT model.py; GPT-2, section 2.3.
    """

    config: BlockConfig
    platform: str

    def setup(self) -> None:
        config, platform = self.config, self.platform
        self.wte = layers.Embed(config, platform, config.require_vocab_size())
        self.wpe = layers.Embed(config, platform, config.block_size)
        self.drop = layers.Dropout(config.dropout)
        self.h = layers.Block(config, platform)
        self.ln_f = layers.layer_norm(config)

    def __call__(self, tokens_BT: Array, **options: Any) -> Array:
        """Logits of each next token, f32 [B, T, V]. Arguments are those of `hidden`."""
        return self.logits(self.hidden(tokens_BT, **options))

    def hidden(
        self,
        tokens_BT: Array,
        deterministic: bool = True,
        rows_B: Array | None = None,
        *,
        segments_BT: Array | None = None,
        memory: layers.Memory | None = None,
    ) -> Array:
        """The input of the head, [B, T, C].

        Args:
          tokens_BT: token ids, i32. Raises ValueError if T is above block_size.
          deterministic: False applies dropout, which needs rngs={"dropout": key}.
          rows_B: indices of the rows in the whole batch; 0 to B - 1 by default.
          segments_BT: segment ids, i32, each of consecutive positions. Positions attend
            only to their segment, and count from 0 in it. None for one segment.
          memory: the encoder's output, in an encoder-decoder.
        """
        rows_B = layers.dropout_rows(rows_B, len(tokens_BT), deterministic)
        mask, positions_BT = Mask(segments_BS=segments_BT), None
        if segments_BT is not None:
            positions_BT = layers.segment_positions(segments_BT)
        x_BTC = self.drop(self._embed(tokens_BT, positions_BT), rows_B)
        return self.ln_f(layers.apply_blocks(self.h, x_BTC, mask, rows_B, memory))

    def head(self, params: Any) -> Array:
        """The head's weights, f32 [V, C], shared with the token embedding."""
        return params["wte"]["embedding"]

    def logits(self, x_BTC: Array) -> Array:
        """The logits x @ head.T, f32 [B, T, V]."""
        operands = x_BTC, self.wte.embedding.astype(x_BTC.dtype)
        logits = ops.einsum("BTC,VC->BTV", *operands, jnp.float32, self.platform)
        return layers.constrain(logits, ("batch", "time", "vocab"))

    def init_cache(self, rows: int) -> tuple[KV, ...]:
        """An empty cache for each layer, with room for block_size tokens per row."""
        config = self.config
        shape = (rows * config.n_head, config.block_size, config.head_dim)
        empty = jnp.zeros(shape, jnp.dtype(config.compute_dtype))
        return ((empty, empty),) * config.n_layer

    def next_token_logits(
        self,
        tokens_BT: Array,
        last_B: Array,
        start_B: Array | None = None,
        caches: tuple[KV, ...] | None = None,
        memory: tuple[layers.Memory, ...] | None = None,
    ) -> tuple[Array, tuple[KV, ...]]:
        """Logits of each row's next token, f32 [B, V], and the updated caches.

        Applies the blocks one by one; params["h"] must be a tuple of their parameters.

        Args:
          tokens_BT: token ids, i32, padded on the right.
          last_B: index of each row's last token, i32.
          start_B: tokens per row already in the caches, i32; None if they are empty.
          caches: one per layer, with room for the new tokens; None for no cache.
          memory: each layer's keys and values of the encoder's output, if any.
        """
        T, start = tokens_BT.shape[1], 0 if start_B is None else start_B[:, None]
        positions_BT = None if start_B is None else start + jnp.arange(T)
        x_BTC, mask = self._embed(tokens_BT, positions_BT), Mask(True, positions_BT)
        block = layers.Block(self.config, self.platform, parent=None)
        blocks, new = self.variables["params"]["h"], []
        none = (None,) * len(blocks)
        for params, cache, kv in zip(
            blocks, caches or none, memory or none, strict=True
        ):
            options = {"cache": cache, "start_B": start_B, "memory": kv}
            if params is blocks[-1] and T > 1:  # only its last position is needed
                mask, options["last_B"] = Mask(True, start + last_B[:, None]), last_B
            x_BTC, cache = block.apply({"params": params}, x_BTC, mask, **options)
            new.append(cache)
        return self.logits(self.ln_f(x_BTC))[:, 0], tuple(new)

    def _embed(self, tokens_BT: Array, positions_BT: Array | None = None) -> Array:
        T = tokens_BT.shape[1]
        self.config.check_length(T)
        positions_BT = jnp.arange(T) if positions_BT is None else positions_BT
        return self.wte(tokens_BT) + self.wpe(positions_BT)
