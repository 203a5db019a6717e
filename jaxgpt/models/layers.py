"""What every model shares: attention, the feed-forward MLP, and the block of both.

B batch   T time   S key time   C n_embd   H heads   D head_dim   F mlp (4 C)

Parameter names are nanoGPT's. `rows_B` turns dropout on: the rows' numbers in the whole
batch. With the step's key they decide the masks, so that a batch cut into pieces or
spread over devices drops the same activations. None turns dropout off.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt.config import ModelConfig

INIT_STD = 0.02

# Says by its axes' names how an activation is cut, if a mesh has rules for the names.
constrain = nn.with_logical_constraint
RESIDUAL = ("batch", "time", "embed")


def residual_init(config: ModelConfig) -> nn.initializers.Initializer:
    """Initialiser of the projections that end in the residual stream.

    Source: GPT-2, section 2.3: their scale shrinks with the number of residual layers.
    """
    return nn.initializers.normal(INIT_STD / (2 * config.n_layer) ** 0.5)


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """LayerNorm with PyTorch's epsilon; statistics in float32."""
    return nn.LayerNorm(
        epsilon=1e-5, use_bias=config.bias, dtype=jnp.dtype(config.compute_dtype)
    )


def check_length(length: int, config: ModelConfig) -> None:
    """Raises ValueError if a model can't look at `length` tokens at once."""
    if length > config.block_size:
        raise ValueError(
            f"{length} tokens do not fit block_size={config.block_size}; "
            "crop them to the last block_size tokens"
        )


def dropout_rows(
    batch_size: int, deterministic: bool, rows_B: jax.Array | None
) -> jax.Array | None:
    """The `rows_B` that a model's layers get: None if `deterministic`, else never."""
    if deterministic:
        return None
    return jnp.arange(batch_size) if rows_B is None else rows_B


class Dropout(nn.Module):
    """Zeroes a fraction of `x` and scales up the rest."""

    rate: float

    def __call__(self, x: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        if rows_B is None or self.rate == 0:
            return x
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
            self.make_rng("dropout"), rows_B
        )
        keep = jax.vmap(
            lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:])
        )(keys_B)
        return jnp.where(keep, x / (1 - self.rate), 0)


class Attention(nn.Module):
    """Causal multi-head self-attention.

    Source: "Attention Is All You Need", section 3.2.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        self.c_attn = nn.DenseGeneral(
            (3, config.n_head, config.head_dim),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=nn.initializers.normal(INIT_STD),
        )
        self.c_proj = nn.DenseGeneral(
            config.n_embd,
            axis=(-2, -1),
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=residual_init(config),
        )
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        """Every position attends to itself and the positions before it."""
        T = x_BTC.shape[1]
        q_BTHD, k_BTHD, v_BTHD = self._project(x_BTC)
        mask_TS = jnp.tril(jnp.ones((T, T), bool))
        return self._attend(q_BTHD, k_BTHD, v_BTHD, mask_TS, rows_B)

    def decode(
        self,
        x_BTC: jax.Array,
        start_B: jax.Array,
        k_BSHD: jax.Array,
        v_BSHD: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `__call__`, for positions start_B + t after those in a cache of S slots.

        Returns the output [B, T, C], and the cached keys and values with the new ones
        written in.
        """
        T, S = x_BTC.shape[1], k_BSHD.shape[1]
        q_BTHD, k_BTHD, v_BTHD = self._project(x_BTC)

        def write(
            cache_SHD: jax.Array, new_THD: jax.Array, start: jax.Array
        ) -> jax.Array:
            return jax.lax.dynamic_update_slice(cache_SHD, new_THD, (start, 0, 0))

        k_BSHD = jax.vmap(write)(k_BSHD, k_BTHD, start_B)
        v_BSHD = jax.vmap(write)(v_BSHD, v_BTHD, start_B)
        position_BT = start_B[:, None] + jnp.arange(T)
        mask_B1TS = (jnp.arange(S) <= position_BT[..., None])[:, None]
        return self._attend(q_BTHD, k_BSHD, v_BSHD, mask_B1TS, None), k_BSHD, v_BSHD

    def _project(self, x_BTC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv_BT3HD = constrain(
            self.c_attn(x_BTC), ("batch", "time", "qkv", "heads", "head_dim")
        )
        return qkv_BT3HD[:, :, 0], qkv_BT3HD[:, :, 1], qkv_BT3HD[:, :, 2]

    def _attend(
        self,
        q_BTHD: jax.Array,
        k_BSHD: jax.Array,
        v_BSHD: jax.Array,
        mask: jax.Array,
        rows_B: jax.Array | None,
    ) -> jax.Array:
        """Averages the values, weighted by softmax of the scaled, masked scores."""
        scores_BHTS = jnp.einsum(
            "BTHD,BSHD->BHTS", q_BTHD, k_BSHD, preferred_element_type=jnp.float32
        )
        scores_BHTS *= self.config.head_dim**-0.5
        scores_BHTS = jnp.where(mask, scores_BHTS, -jnp.inf)
        weights_BHTS = jax.nn.softmax(scores_BHTS).astype(q_BTHD.dtype)
        self.sow("intermediates", "attention", weights_BHTS)
        weights_BHTS = self.attn_dropout(weights_BHTS, rows_B)
        out_BTHD = jnp.einsum("BHTS,BSHD->BTHD", weights_BHTS, v_BSHD)
        out_BTHD = constrain(out_BTHD, ("batch", "time", "heads", "head_dim"))
        return self.resid_dropout(self.c_proj(out_BTHD), rows_B)


class MLP(nn.Module):
    """Linear, GELU, Linear: each position on its own."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        self.c_fc = nn.Dense(
            4 * config.n_embd,
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=nn.initializers.normal(INIT_STD),
        )
        self.c_proj = nn.Dense(
            config.n_embd,
            use_bias=config.bias,
            dtype=dtype,
            kernel_init=residual_init(config),
        )
        self.dropout = Dropout(config.dropout)

    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        h_BTF = constrain(self.c_fc(x_BTC), ("batch", "time", "mlp"))
        h_BTF = nn.gelu(h_BTF, approximate=self.config.gelu == "tanh")
        return self.dropout(self.c_proj(h_BTF), rows_B)


class Block(nn.Module):
    """A Transformer block: communication, then computation, each a residual branch."""

    config: ModelConfig

    def setup(self) -> None:
        self.ln_1 = layer_norm(self.config)
        self.attn = Attention(self.config)
        self.ln_2 = layer_norm(self.config)
        self.mlp = MLP(self.config)

    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), rows_B)
        return x_BTC + self.mlp(self.ln_2(x_BTC), rows_B)

    def decode(
        self,
        x_BTC: jax.Array,
        start_B: jax.Array,
        k_BSHD: jax.Array,
        v_BSHD: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `__call__`, with the cached keys and values of earlier positions."""
        out_BTC, k_BSHD, v_BSHD = self.attn.decode(
            self.ln_1(x_BTC), start_B, k_BSHD, v_BSHD
        )
        x_BTC = x_BTC + out_BTC
        return x_BTC + self.mlp(self.ln_2(x_BTC), None), k_BSHD, v_BSHD
