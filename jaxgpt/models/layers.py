"""Layers of the Transformers: linear, dropout, attention, MLP, and the block.

B batch   T time   S key time   C n_embd   H heads   D head_dim   F mlp (4 C)

Parameter names are nanoGPT's; `platform` is as in `jaxgpt.ops`. Passing `rows_B`, row
indices in the whole batch, turns on dropout; its masks do not depend on microbatches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt import ops
from jaxgpt.config import BlockConfig
from jaxgpt.ops.attention import KV, Mask
from jaxgpt.ops.dropout import Drop

INIT = nn.initializers.normal(0.02)

# Names the axes of an activation, which `jaxgpt.parallel.mesh` maps to mesh axes.
constrain = nn.with_logical_constraint


def residual_init(config: BlockConfig) -> nn.initializers.Initializer:
    """Initialiser of projections into the residual stream, as in GPT-2, section 2.3."""
    return nn.initializers.normal(0.02 / (2 * config.n_layer) ** 0.5)


def layer_norm(config: BlockConfig) -> nn.LayerNorm:
    """LayerNorm with PyTorch's epsilon and float32 statistics."""
    dtype = jnp.dtype(config.compute_dtype)
    return nn.LayerNorm(epsilon=1e-5, use_bias=config.bias, dtype=dtype)


def take(x_BT: Array, index_B: Array) -> Array:
    """Selects position index_B of each row of x [B, T, ...], giving [B, 1, ...]."""
    index_B1 = index_B.reshape(-1, *(1,) * (x_BT.ndim - 1))
    return jnp.take_along_axis(x_BT, index_B1, axis=1)


def segment_positions(segments_BT: Array) -> Array:
    """Positions that count from 0 in each segment, i32 [B, T]."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    same_BT = jnp.pad(segments_BT[:, 1:] == segments_BT[:, :-1], ((0, 0), (1, 0)))
    return index_BT - jax.lax.cummax(jnp.where(same_BT, 0, index_BT), axis=1)


def dropout_rows(rows_B: Array | None, B: int, deterministic: bool) -> Array | None:
    """The rows' indices, by default 0 to B - 1, or None to turn dropout off."""
    if deterministic:
        return None
    return jnp.arange(B) if rows_B is None else rows_B


class Embed(nn.Module):
    """An embedding table with one vector per token or position."""

    config: BlockConfig
    platform: str
    size: int

    def setup(self) -> None:
        self.embedding = self.param("embedding", INIT, (self.size, self.config.n_embd))

    def __call__(self, index_BT: Array) -> Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        return ops.embed(self.embedding, index_BT, dtype, self.platform)


class Linear(nn.Module):
    """Linear layer: the einsum `spec` of x and a kernel, plus a bias if configured."""

    config: BlockConfig
    platform: str
    spec: str
    shape: tuple[int, ...]
    init: nn.initializers.Initializer = INIT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        kernel = self.param("kernel", self.init, self.shape).astype(dtype)
        y = ops.einsum(self.spec, x.astype(dtype), kernel, dtype, self.platform)
        if self.config.bias:
            axes, out = self.spec.split(",")[1].split("->")
            shape = [n for axis, n in zip(axes, self.shape, strict=True) if axis in out]
            y += self.param("bias", nn.initializers.zeros, shape).astype(dtype)
        return y


class QKVProjection(nn.Module):
    """The linear layer to the queries, keys and values of all heads."""

    config: BlockConfig
    platform: str

    @nn.compact
    def __call__(self, x_BTC: Array, part: slice = slice(None)) -> list[Array]:
        """Arrays [B, T, H, D]: those in `part` of queries, keys and values."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        shape = (config.n_embd, 3, config.n_head, config.head_dim)
        kernel = self.param("kernel", INIT, shape)[:, part].astype(dtype)
        arrays = ops.project_qkv(x_BTC.astype(dtype), kernel, self.platform)
        if config.bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:])[part]
            arrays = [a + b for a, b in zip(arrays, bias.astype(dtype), strict=True)]
        return arrays


class Dropout(nn.Module):
    """Zeroes a fraction of `x` and scales up the rest; off if rows_B is None."""

    rate: float

    def __call__(self, x: Array, rows_B: Array | None) -> Array:
        drop = self.of(rows_B)
        return drop(x) if drop else x

    def of(self, rows_B: Array | None) -> Drop:
        """A function that applies dropout to these rows; None if dropout is off."""
        if rows_B is None or self.rate == 0:
            return None
        key, fold_in = self.make_rng("dropout"), jax.vmap(jax.random.fold_in, (None, 0))
        return partial(ops.dropout, self.rate, fold_in(key, rows_B))


class Attention(nn.Module):
    """Multi-head attention. Source: "Attention Is All You Need", section 3.2."""

    config: BlockConfig
    platform: str

    def setup(self) -> None:
        config, linear = self.config, partial(Linear, self.config, self.platform)
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.c_attn = QKVProjection(config, self.platform)
        self.c_proj = linear("BTHD,HDC->BTC", (H, D, C), residual_init(config))
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def __call__(
        self,
        x_BTC: Array,
        mask: Mask,
        rows_B: Array | None = None,
        memory: Sequence[Array] | None = None,
        cache: KV | None = None,
        start_B: Array | None = None,
    ) -> tuple[Array, KV | None]:
        """The attention output for x, [B, T, C], and the updated cache.

        Args:
          mask: which keys each position attends to.
          memory: keys and values to attend to (`keys_and_values`); those of x if None.
          cache: the new keys and values are written to it, from start_B of each row on.
          start_B: if given, x attends to the cache; if None, only to the new keys.
        """
        if memory is None:
            q_BTHD, k_BSHD, v_BSHD = self.c_attn(x_BTC)
        else:
            (q_BTHD,), (k_BSHD, v_BSHD) = self.c_attn(x_BTC, slice(0, 1)), memory
        if cache is not None:
            at_B = jnp.zeros(len(x_BTC), jnp.int32) if start_B is None else start_B
            cache = ops.update_cache(cache, (k_BSHD, v_BSHD), at_B)
        if cache is not None and start_B is not None:
            out_BTHD = ops.cached_attention(q_BTHD, cache, mask, self.platform)
        else:
            qkv, drop = (q_BTHD, k_BSHD, v_BSHD), self.attn_dropout.of(rows_B)
            if drop:  # the same mask, however long the padding
                N = self.config.block_size
                drop = partial(drop, shape=(self.config.n_head, N, N))
            fused = self.config.fused_attention
            out_BTHD = ops.attention(*qkv, mask, drop, self.platform, fused)
            if self.is_mutable_collection("intermediates"):  # for maps and diagnosis
                maps_BHTS = ops.attention_weights(q_BTHD, k_BSHD, mask, self.platform)
                maps_BHTS = self.attn_dropout(maps_BHTS, None)  # a layer to diagnose
                self.sow("intermediates", "attention", maps_BHTS)
        out_BTHD = constrain(out_BTHD, ("batch", "time", "heads", "head_dim"))
        out_BTC = ops.unfused(self.c_proj(out_BTHD), self.platform)
        return self.resid_dropout(out_BTC, rows_B), cache

    def keys_and_values(self, memory_BSC: Array) -> list[Array]:
        """Projects a memory to keys and values, for `memory` of `__call__`."""
        return self.c_attn(memory_BSC, slice(1, 3))


@flax.struct.dataclass
class Memory:
    """The encoder's output, to which the decoder's blocks attend.

    Attributes:
      states: the output, [B, S, C], or a list of a layer's keys and values of it.
      lengths_B: tokens in each row before the right padding, i32; S if None.
    """

    states: Any
    lengths_B: Array | None = None


class MLP(nn.Module):
    """Linear, GELU, Linear, applied to each position separately."""

    config: BlockConfig
    platform: str

    def setup(self) -> None:
        config, linear = self.config, partial(Linear, self.config, self.platform)
        C, F = config.n_embd, 4 * config.n_embd
        self.c_fc = linear("BTC,CF->BTF", (C, F))
        self.c_proj = linear("BTF,FC->BTC", (F, C), residual_init(config))
        self.dropout = Dropout(config.dropout)

    def __call__(self, x_BTC: Array, rows_B: Array | None) -> Array:
        h_BTF = constrain(self.c_fc(x_BTC), ("batch", "time", "mlp"))
        h_BTF = ops.gelu(h_BTF, self.config.gelu, self.platform)
        return self.dropout(ops.unfused(self.c_proj(h_BTF), self.platform), rows_B)


class Block(nn.Module):
    """A pre-norm Transformer block: attention, then an MLP, each with a residual.

    Given a memory, cross-attention to it comes between the two.
    """

    config: BlockConfig
    platform: str

    def setup(self) -> None:
        self.ln_1 = layer_norm(self.config)
        self.attn = Attention(self.config, self.platform)
        self.ln_cross = layer_norm(self.config)
        self.cross_attn = Attention(self.config, self.platform)
        self.ln_2 = layer_norm(self.config)
        self.mlp = MLP(self.config, self.platform)

    def __call__(
        self,
        x_BTC: Array,
        mask: Mask,
        rows_B: Array | None = None,
        last_B: Array | None = None,
        memory: Memory | None = None,
        **cached: Any,
    ) -> tuple[Array, KV | None]:
        """The residual stream (only position last_B if given) and the updated cache."""
        h_BTC, kv = self.ln_1(x_BTC), None
        if last_B is not None:
            kv = self.attn.keys_and_values(h_BTC)
            x_BTC, h_BTC = take(x_BTC, last_B), take(h_BTC, last_B)
        out_BTC, cache = self.attn(h_BTC, mask, rows_B, kv, **cached)
        x_BTC = x_BTC + out_BTC
        if memory is not None:
            kv = memory.states
            if not isinstance(kv, list):
                kv = self.cross_attn.keys_and_values(kv)
            mask = Mask(causal=False, lengths_B=memory.lengths_B)
            x_BTC += self.cross_attn(self.ln_cross(x_BTC), mask, rows_B, kv)[0]
        return x_BTC + self.mlp(self.ln_2(x_BTC), rows_B), cache


def apply_blocks(
    block: Block,
    x_BTC: Array,
    mask: Mask,
    rows_B: Array | None,
    memory: Memory | None = None,
) -> Array:
    """Applies n_layer blocks, as a scan over parameters with a leading n_layer axis.

    The scan is unrolled `unroll` blocks at a time.
    """
    config, axes = block.config, ("batch", "time", "embed")

    def body(block: nn.Module, x_BTC: Array) -> tuple[Array, None]:
        x_BTC, _ = block(x_BTC, mask, rows_B, memory=memory)
        return constrain(x_BTC, axes), None

    blocks = nn.scan(
        nn.remat(body, prevent_cse=False) if config.remat else body,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=config.n_layer,
        # Without a loop, XLA would reuse the forward pass and so undo remat.
        unroll=1 if config.remat else config.unroll,
    )
    return blocks(block, constrain(x_BTC, axes))[0]
