"""The decoder-only GPT: GPT-2's and nanoGPT's model.

B batch   T time   C n_embd   V vocab   L layers
"""

import operator
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
    Embed,
    check_length,
    constrain,
    dropout_rows,
    einsum,
    layer_norm,
)


def unstacked(params: Any) -> Any:
    """The GPT's parameters with each layer's on their own, for `GPT.decode` in a loop.

    XLA would cut them out of the stack for every token, which takes 3 times as long.
    They are a copy: while text is generated, the layers take twice their memory.
    """
    stack = params["h"]
    if isinstance(stack, tuple):
        return params
    n_layer = len(jax.tree.leaves(stack)[0])
    layers = (jax.tree.map(operator.itemgetter(i), stack) for i in range(n_layer))
    return {**params, "h": tuple(layers)}


class GPT(nn.Module):
    """Token ids to logits of each next token.

    The blocks' parameters are stacked along a leading axis of n_layer, and the blocks
    run as one scan, of which `unroll` are compiled: a deep model takes no longer to
    compile than one of so many.

    Source: nanoGPT model.py; GPT-2, "Language Models are Unsupervised Multitask
    Learners", section 2.3.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        init = nn.initializers.normal(INIT_STD)
        self.wte = Embed(
            config.known_vocab_size(), config.n_embd, dtype=dtype, embedding_init=init
        )
        self.wpe = Embed(
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

        As `hidden`, which is all but the head.
        """
        x_BTC = self.hidden(tokens_BT, deterministic=deterministic, rows_B=rows_B)
        return constrain(self._head(x_BTC), ("batch", "time", "vocab"))

    def hidden(
        self,
        tokens_BT: jax.Array,
        *,
        deterministic: bool = True,
        rows_B: jax.Array | None = None,
    ) -> jax.Array:
        """What the head multiplies with the token embedding, [B, T, C].

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
        return self.ln_f(x_BTC)

    def decode(
        self, tokens_BT: jax.Array, count: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Reads the next tokens of each row, with the earlier ones in the cache.

        Args:
          tokens_BT: token ids, i32; the first `count` of each row are read.
          count: i32 scalar, from 1 to T.
          cache: with T more slots; what a row has before its first is passed over.

        Returns the logits of the token that follows each row, f32 [B, V], and the cache
        with the tokens read. Raises ValueError if T is above block_size.
        """
        T = tokens_BT.shape[1]
        check_length(T, self.config)
        start, first_B = cache.length, cache.first_B
        position_BT = start + jnp.arange(T) - first_B[:, None]
        # Padding may stand before the first position, or past the last one.
        position_BT = jnp.clip(position_BT, 0, self.config.block_size - 1)
        x_BTC = self.wte(tokens_BT) + self.wpe(position_BT)
        block, keys, values = Block(self.config, parent=None), [], []
        layers = unstacked(self.variables["params"])["h"]
        for layer, *kv in zip(layers, cache.keys, cache.values, strict=True):
            # Of the last layer's output nothing but the last position is asked for.
            asked = count - 1 if layer is layers[-1] else None
            x_BTC, k_NSD, v_NSD = block.apply(
                {"params": layer},
                x_BTC,
                start,
                first_B,
                *kv,
                asked=asked,
                method=Block.decode,
            )
            keys.append(k_NSD)
            values.append(v_NSD)
        logits_BV = self._head(self.ln_f(x_BTC))[:, 0]
        return logits_BV, KVCache(tuple(keys), tuple(values), start + count, first_B)

    def _over_layers(self, body: Callable[..., Any]) -> Callable[..., Any]:
        return nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.n_layer,
            # What the loop computes again, XLA would compute once where there is none.
            unroll=1 if self.config.remat else self.config.unroll,
        )

    def _head(self, x_BTC: jax.Array) -> jax.Array:
        """The head, whose weights are the token embedding's."""
        return einsum("BTC,VC->BTV", x_BTC, self.wte.embedding.astype(x_BTC.dtype))
