"""The models of the lecture, in order, from a bigram table to a GPT.

B batch   T time   S key time   C n_embd   H heads   D head_dim   V vocab

Linear layers and embeddings use PyTorch's default initialisation, as in the lecture.
`rows_B` turns on dropout, as in layers.py.

Source: "Let's build GPT: from scratch, in code, spelled out".
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import BigramConfig, LectureConfig
from jaxgpt.models.layers import Dropout


def embedding(rows: int, features: int, name: str) -> nn.Embed:
    """torch.nn.Embedding: a table of vectors, initialised from N(0, 1)."""
    init = nn.initializers.normal(1.0)
    return nn.Embed(rows, features, embedding_init=init, name=name)


def linear(inputs: int, outputs: int, name: str, bias: bool = True) -> nn.Dense:
    """torch.nn.Linear: x W + b, both initialised uniformly in +-1/sqrt(inputs)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        bound = inputs**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Dense(outputs, use_bias=bias, kernel_init=init, bias_init=init, name=name)


def layer_norm(name: str) -> nn.LayerNorm:
    """torch.nn.LayerNorm, with its default epsilon."""
    return nn.LayerNorm(epsilon=1e-5, name=name)


class Bigram(nn.Module):
    """Each token looks up the logits of the next one in a table [V, V]."""

    config: BigramConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        deterministic: bool = True,
        rows_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of each next token, f32 [B, T, V].

        Takes the arguments of `GPT.__call__`; the last two are ignored (no dropout).
        """
        V = self.config.require_vocab_size()
        return embedding(V, V, "table")(tokens_BT)


# The mathematical trick in self-attention: four ways to average each position with all
# previous ones. Each maps x [B, T, C] to its running mean [B, T, C].


def average_by_loop(x_BTC: jax.Array) -> jax.Array:
    """The mean up to each position, computed in a loop over positions."""
    T = x_BTC.shape[1]
    return jnp.stack([x_BTC[:, : t + 1].mean(axis=1) for t in range(T)], axis=1)


def average_by_matrix(x_BTC: jax.Array) -> jax.Array:
    """The same by one matmul with a triangular matrix whose rows sum to one."""
    T = x_BTC.shape[1]
    weights_TS = jnp.tril(jnp.ones((T, T)))
    weights_TS /= weights_TS.sum(axis=1, keepdims=True)
    return jnp.einsum("TS,BSC->BTC", weights_TS, x_BTC)


def average_by_softmax(x_BTC: jax.Array) -> jax.Array:
    """The same, with the matrix as a softmax of zeros, and -inf for the future."""
    T = x_BTC.shape[1]
    past_TS = jnp.tril(jnp.ones((T, T), bool))
    weights_TS = jax.nn.softmax(jnp.where(past_TS, 0.0, -jnp.inf))
    return jnp.einsum("TS,BSC->BTC", weights_TS, x_BTC)


def average_by_attention(x_BTC: jax.Array) -> jax.Array:
    """The same by self-attention with zero queries, which weight all keys equally."""
    weights_BTS = attention_weights(jnp.zeros_like(x_BTC), x_BTC)
    return jnp.einsum("BTS,BSC->BTC", weights_BTS, x_BTC)


def attention_scores(q_BTD: jax.Array, k_BSD: jax.Array) -> jax.Array:
    """The dot product of each query with each key, over sqrt(D) [B, T, S].

    The scaling keeps the variance at 1 if queries and keys have variance 1, so that the
    softmax is spread over many keys instead of peaking at one.
    """
    return jnp.einsum("BTD,BSD->BTS", q_BTD, k_BSD) * q_BTD.shape[-1] ** -0.5


def attention_weights(q_BTD: jax.Array, k_BSD: jax.Array) -> jax.Array:
    """Softmax of the scores over each position and the previous ones [B, T, S]."""
    scores_BTS = attention_scores(q_BTD, k_BSD)
    past_TS = jnp.tril(jnp.ones(scores_BTS.shape[1:], bool))
    return jax.nn.softmax(jnp.where(past_TS, scores_BTS, -jnp.inf))


class Head(nn.Module):
    """One head of causal self-attention, [B, T, C] to [B, T, D]."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        C, D = self.config.n_embd, self.config.head_dim
        k_BTD = linear(C, D, "key", bias=False)(x_BTC)
        q_BTD = linear(C, D, "query", bias=False)(x_BTC)
        v_BTD = linear(C, D, "value", bias=False)(x_BTC)
        weights_BTS = attention_weights(q_BTD, k_BTD)
        self.sow("intermediates", "attention", weights_BTS)
        weights_BTS = Dropout(self.config.dropout)(weights_BTS, rows_B)
        return jnp.einsum("BTS,BSD->BTD", weights_BTS, v_BTD)


class MultiHead(nn.Module):
    """Several heads in parallel: `nn.vmap` of one, each with its own parameters."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        heads = nn.vmap(
            Head,
            in_axes=None,
            out_axes=2,
            axis_size=self.config.n_head,
            variable_axes={"params": 0, "intermediates": 1},
            split_rngs={"params": True, "dropout": True},
        )
        out_BTHD = heads(self.config, name="heads")(x_BTC, rows_B)
        return out_BTHD.reshape(x_BTC.shape)  # concatenated


class FeedForwardBlock(nn.Module):
    """Communication, then computation: attention, then a layer at each position."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        C = self.config.n_embd
        x_BTC = MultiHead(self.config, name="sa")(x_BTC, rows_B)
        return nn.relu(linear(C, C, "ffwd")(x_BTC))


class SelfAttention(nn.Module):
    """Multi-head attention, and a projection back into the residual stream."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        C = self.config.n_embd
        x_BTC = MultiHead(self.config, name="multi_head")(x_BTC, rows_B)
        x_BTC = linear(C, C, "proj")(x_BTC)
        return Dropout(self.config.dropout)(x_BTC, rows_B)


class FeedForward(nn.Module):
    """An MLP with 4 C hidden units, projected back into the residual stream."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        C = self.config.n_embd
        x_BTC = linear(4 * C, C, "proj")(nn.relu(linear(C, 4 * C, "fc")(x_BTC)))
        return Dropout(self.config.dropout)(x_BTC, rows_B)


class ResidualBlock(nn.Module):
    """Adds residual connections, through which gradients reach the first layers."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        x_BTC = x_BTC + SelfAttention(self.config, name="sa")(x_BTC, rows_B)
        return x_BTC + FeedForward(self.config, name="ffwd")(x_BTC, rows_B)


class LayerNormBlock(nn.Module):
    """Adds LayerNorm to the input of each half: the pre-norm block of GPT-2."""

    config: LectureConfig

    @nn.compact
    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        h_BTC = layer_norm("ln1")(x_BTC)
        x_BTC = x_BTC + SelfAttention(self.config, name="sa")(h_BTC, rows_B)
        h_BTC = layer_norm("ln2")(x_BTC)
        return x_BTC + FeedForward(self.config, name="ffwd")(h_BTC, rows_B)


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "attention": MultiHead,
    "feed-forward": FeedForwardBlock,
    "residual": ResidualBlock,
    "layer-norm": LayerNormBlock,
}


class LectureGPT(nn.Module):
    """The lecture's Transformers: embeddings, n_layer blocks and a linear head."""

    config: LectureConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        deterministic: bool = True,
        rows_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of each next token, f32 [B, T, V].

        Takes the arguments of `GPT.__call__`. Raises ValueError if T is above
        block_size.
        """
        config = self.config
        (B, T), V, C = tokens_BT.shape, config.require_vocab_size(), config.n_embd
        config.check_length(T)
        rows_B = jnp.arange(B) if rows_B is None else rows_B
        rows_B = None if deterministic else rows_B
        position = embedding(config.block_size, C, "position_embedding")
        x_BTC = embedding(V, C, "token_embedding")(tokens_BT) + position(jnp.arange(T))
        for layer in range(config.n_layer):
            block = BLOCKS[config.architecture](config, name=f"block_{layer}")
            x_BTC = block(x_BTC, rows_B)
        if config.architecture == "layer-norm":
            x_BTC = layer_norm("ln_f")(x_BTC)
        return linear(C, V, "lm_head")(x_BTC)
