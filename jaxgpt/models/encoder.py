"""The encoder, in which every token attends to every other, and its two heads.

B batch   T time   K labels, or masked positions   C n_embd   V vocab

It is the GPT without the causal mask. Rows are padded on the right; no token attends to
padding. Source: BERT (Devlin et al. 2018), with pre-norm blocks.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxgpt import ops
from jaxgpt.config import BlockConfig, ClassifierConfig, MaskedLMConfig
from jaxgpt.models import layers
from jaxgpt.ops.attention import Mask


class Encoder(nn.Module):
    """Maps token ids to a vector for each token, [B, T, C]."""

    config: BlockConfig
    platform: str
    wte: layers.Embed  # shared with the head or the decoder

    def setup(self) -> None:
        self.wpe = layers.Embed(self.config, self.platform, self.config.block_size)
        self.drop = layers.Dropout(self.config.dropout)
        self.h = layers.Block(self.config, self.platform)
        self.ln_f = layers.layer_norm(self.config)

    def __call__(
        self,
        tokens_BT: Array,
        lengths_B: Array | None = None,
        rows_B: Array | None = None,
    ) -> Array:
        """The final LayerNorm's output.

        Args:
          tokens_BT: token ids, i32. Raises ValueError if T is above block_size.
          lengths_B: tokens in each row before the right padding, i32; T if None.
          rows_B: indices of the rows in the whole batch; None for no dropout.
        """
        T = tokens_BT.shape[1]
        self.config.check_length(T)
        x_BTC = self.drop(self.wte(tokens_BT) + self.wpe(jnp.arange(T)), rows_B)
        mask = Mask(causal=False, lengths_B=lengths_B)
        return self.ln_f(layers.apply_blocks(self.h, x_BTC, mask, rows_B))


class Classifier(nn.Module):
    """Maps token ids to logits of the labels."""

    config: ClassifierConfig
    platform: str

    def setup(self) -> None:
        config, platform = self.config, self.platform
        self.wte = layers.Embed(config, platform, config.require_vocab_size())
        self.encoder = Encoder(config, platform, self.wte)
        self.drop = layers.Dropout(config.dropout)
        shape = (config.n_embd, len(config.labels))
        self.classifier = layers.Linear(config, platform, "BC,CK->BK", shape)

    def __call__(
        self,
        tokens_BT: Array,
        lengths_B: Array | None = None,
        deterministic: bool = True,
        rows_B: Array | None = None,
    ) -> Array:
        """Logits of each label, f32 [B, K].

        Args:
          tokens_BT, lengths_B: as for `Encoder`.
          deterministic: False applies dropout, which needs rngs={"dropout": key}.
          rows_B: indices of the rows in the whole batch; 0 to B - 1 by default.
        """
        rows_B = layers.dropout_rows(rows_B, len(tokens_BT), deterministic)
        x_BTC = self.encoder(tokens_BT, lengths_B, rows_B)
        pooled_BC = x_BTC[:, 0]
        if self.config.pooling == "mean":
            pooled_BC = masked_mean(x_BTC, lengths_B)
        return self.classifier(self.drop(pooled_BC, rows_B)).astype(jnp.float32)


def masked_mean(x_BTC: Array, lengths_B: Array | None) -> Array:
    """The mean over each row's tokens, without its padding, f32 [B, C]."""
    x_BTC = x_BTC.astype(jnp.float32)
    if lengths_B is None:
        return x_BTC.mean(axis=1)
    real_BT = jnp.arange(x_BTC.shape[1]) < lengths_B[:, None]
    return (x_BTC * real_BT[..., None]).sum(axis=1) / lengths_B[:, None]


class MaskedLM(nn.Module):
    """Maps token ids to logits of the original tokens, where some were replaced."""

    config: MaskedLMConfig
    platform: str

    def setup(self) -> None:
        config, platform = self.config, self.platform
        self.wte = layers.Embed(config, platform, config.require_vocab_size())
        self.encoder = Encoder(config, platform, self.wte)
        shape = (config.n_embd, config.n_embd)
        self.dense = layers.Linear(config, platform, "BTC,CD->BTD", shape)
        self.ln_head = layers.layer_norm(config)

    def __call__(self, tokens_BT: Array, **options: Any) -> Array:
        """Logits, f32 [B, T, V]. Arguments are those of `hidden`."""
        return self.logits(self.hidden(tokens_BT, **options))

    def logits(self, x_BTC: Array) -> Array:
        """Logits of the head's input, f32 [B, T, V]."""
        head_VC = self.wte.embedding.astype(x_BTC.dtype)
        einsum = partial(ops.einsum, "BTC,VC->BTV")
        return einsum(x_BTC, head_VC, jnp.float32, self.platform)

    def hidden(
        self,
        tokens_BT: Array,
        lengths_B: Array | None = None,
        positions_BK: Array | None = None,
        deterministic: bool = True,
        rows_B: Array | None = None,
    ) -> Array:
        """The input of the head, [B, K, C].

        Takes the arguments of `Classifier.__call__`, and the positions to predict, i32;
        all T by default.
        """
        rows_B = layers.dropout_rows(rows_B, len(tokens_BT), deterministic)
        x_BTC = self.encoder(tokens_BT, lengths_B, rows_B)
        if positions_BK is not None:
            x_BTC = jnp.take_along_axis(x_BTC, positions_BK[..., None], axis=1)
        h_BTC = ops.gelu(self.dense(x_BTC), self.config.gelu, self.platform)
        return self.ln_head(h_BTC)

    def head(self, params: Any) -> Array:
        """The head's weights, f32 [V, C], shared with the token embedding."""
        return params["wte"]["embedding"]
