"""What every model shares: attention, the feed-forward MLP, and the block of both.

B batch   T time   S key time   C n_embd   H heads   D head_dim   F mlp (4 C)
N rows and heads (B H)

Parameter names are nanoGPT's. `rows_B` turns dropout on: the rows' numbers in the whole
batch. With the step's key they decide the masks, so that a batch cut into pieces or
spread over devices drops the same activations. None turns dropout off.
"""

from functools import partial
from string import ascii_lowercase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgpt import runtime
from jaxgpt.config import ModelConfig

INIT_STD = 0.02
# Queries attend in blocks, each to the keys up to its last, which leaves out most of
# what the mask hides: 3/8 of the products with 4 blocks. On 2 CPU cores the 10.8M model
# trains 1.2 times as fast as with one block.
BLOCKS = 4
SMALLEST_BLOCK = 64

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


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(
    spec: str, a: jax.Array, b: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """`jnp.einsum` of two arrays of a dtype, summed in float32, returned in `dtype`.

    The gradient is rounded to that dtype too, before it is multiplied. JAX alone would
    multiply it as it comes, in float32, by arrays of bfloat16.
    """
    # Sums run over their axes by the alphabet: arrays of another order would be copied.
    letters = dict.fromkeys(filter(str.isalpha, spec))
    spec = spec.translate(
        str.maketrans("".join(letters), ascii_lowercase[: len(letters)])
    )
    # CPUs multiply bfloat16 only so; devices that share a sum exchange it in its dtype.
    sums = jnp.float32 if runtime.on_cpu() else dtype
    return jnp.einsum(spec, a, b, preferred_element_type=sums).astype(dtype)


def _einsum_forward(
    spec: str, a: jax.Array, b: jax.Array, dtype: Any
) -> tuple[jax.Array, Any]:
    return einsum(spec, a, b, dtype), (a, b)


def _einsum_backward(
    spec: str, _: Any, operands: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    (a, b), (axes, out) = operands, spec.split("->")
    axes_a, axes_b = axes.split(",")
    grad = grad.astype(a.dtype)
    grad_a = einsum(f"{out},{axes_b}->{axes_a}", grad, b, a.dtype)
    grad_b = einsum(f"{axes_a},{out}->{axes_b}", a, grad, b.dtype)
    return grad_a, grad_b


einsum.defvjp(_einsum_forward, _einsum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VC: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """The table's rows of the tokens [B, T, C], in `dtype`.

    Their gradients are summed in float32, but on TPUs, which exchange them in `dtype`.
    In bfloat16 a frequent token's sum would soon be too large for more to be added, and
    an H100 takes 200 times as long.
    """
    return table_VC.astype(dtype)[tokens_BT]


def _look_up_forward(
    table_VC: jax.Array, tokens_BT: jax.Array, dtype: Any
) -> tuple[jax.Array, Any]:
    return look_up(table_VC, tokens_BT, dtype), (table_VC, tokens_BT)


def _look_up_backward(
    dtype: Any, residuals: tuple[jax.Array, jax.Array], grad_BTC: jax.Array
) -> tuple[jax.Array, None]:
    table_VC, tokens_BT = residuals
    full = runtime.on_cpu() or runtime.on_nvidia()
    sums_VC = jnp.zeros_like(table_VC, dtype=None if full else dtype)
    sums_VC = sums_VC.at[tokens_BT].add(grad_BTC.astype(sums_VC.dtype))
    return sums_VC.astype(table_VC.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


class Embed(nn.Embed):
    """`nn.Embed`, with the gradients of `look_up`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return look_up(self.embedding, inputs, self.dtype)


class Linear(nn.Module):
    """`spec`, an einsum of the input and a kernel, and a bias if the config has them.

    Attributes:
      config: of the model.
      spec: as in "BTC,CF->BTF".
      shape: of the kernel.
      init: of the kernel; biases begin at zero.
    """

    config: ModelConfig
    spec: str
    shape: tuple[int, ...]
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.dtype(self.config.compute_dtype)
        kernel = self.param("kernel", self.init, self.shape)
        y = einsum(self.spec, x.astype(dtype), kernel.astype(dtype), dtype)
        if self.config.bias:
            axes, out = self.spec.split(",")[1].split("->")
            sizes = zip(axes, self.shape, strict=True)
            shape = tuple(size for axis, size in sizes if axis in out)
            bias = self.param("bias", nn.initializers.zeros, shape)
            y += bias.astype(dtype)
        return y


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


def dropout_bits(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bits for an array of `shape` per key, u32 [B, *shape].

    A hash of the key and the place, of some 20 instructions that fuse with what asks.
    `jax.random.bits` passes over memory 20 times: with half as many bits, a step of the
    10.8M model took 2 CPU cores 6.6 s, and so 5.6.

    Source: the finaliser of MurmurHash3, once for each word of the key.
    """
    place = jnp.uint32(0)
    for axis, size in enumerate(shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    words = jax.random.key_data(keys_B).reshape(len(keys_B), 2, *(1,) * len(shape))
    return _mix(_mix(place ^ words[:, 0]) + words[:, 1])


def _mix(bits: jax.Array) -> jax.Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


class Dropout(nn.Module):
    """Zeroes a fraction of `x` and scales up the rest."""

    rate: float

    def __call__(self, x: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        if rows_B is None or self.rate == 0:
            return x
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
            self.make_rng("dropout"), rows_B
        )
        dropped = jnp.uint32(self.rate * 2**32)
        keep = dropout_bits(keys_B, x.shape[1:]) >= dropped
        return jnp.where(keep, x / (1 - self.rate), 0)


def _heads_as_rows(x_BTHD: jax.Array) -> jax.Array:
    """To [N, T, D]. XLA would copy a cache of four axes to multiply it so."""
    B, T, H, D = x_BTHD.shape
    return x_BTHD.swapaxes(1, 2).reshape(B * H, T, D)


def _prefixes(x_BTHD: jax.Array, starts: list[int]) -> list[jax.Array]:
    """All positions before the end of each block [B, S, H, D], given their starts."""
    if not runtime.on_cpu():
        return [x_BTHD[:, :end] for end in (*starts[1:], None)]
    # A slice's gradient is padded: their sum takes a CPU a tenth of a step.
    blocks = jnp.split(x_BTHD, starts[1:], axis=1)
    return [jnp.concatenate(blocks[: i + 1], axis=1) for i in range(len(starts))]


class Attention(nn.Module):
    """Causal multi-head self-attention.

    Source: "Attention Is All You Need", section 3.2.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.c_attn = Linear(
            config, "BTC,CKHD->BTKHD", (C, 3, H, D), nn.initializers.normal(INIT_STD)
        )
        self.c_proj = Linear(config, "BTHD,HDC->BTC", (H, D, C), residual_init(config))
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)

    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        """Every position attends to itself and the positions before it."""
        q_BTHD, k_BTHD, v_BTHD = self._project(x_BTC)
        if self._fuses(rows_B):
            fused_BTHD = jax.nn.dot_product_attention(
                q_BTHD, k_BTHD, v_BTHD, is_causal=True, implementation="cudnn"
            )
            return self._leave(fused_BTHD, rows_B)
        blocks, maps = [], []
        T = x_BTC.shape[1]
        size = max(SMALLEST_BLOCK, -(-T // BLOCKS))
        starts = list(range(0, T, size))
        keys, values = _prefixes(k_BTHD, starts), _prefixes(v_BTHD, starts)
        for i, start in enumerate(starts):  # queries that share the keys up to the last
            end = min(start + size, T)
            mask_TS = jnp.arange(end) <= jnp.arange(start, end)[:, None]
            block_BTHD, map_BHTS = self._attend(
                q_BTHD[:, start:end], keys[i], values[i], mask_TS, rows_B
            )
            blocks.append(block_BTHD)
            maps.append(jnp.pad(map_BHTS, ((0, 0),) * 3 + ((0, T - end),)))
        self.sow("intermediates", "attention", jnp.concatenate(maps, axis=2))
        return self._leave(jnp.concatenate(blocks, axis=1), rows_B)

    def decode(
        self,
        x_BTC: jax.Array,
        start: jax.Array,
        first_B: jax.Array,
        k_NSD: jax.Array,
        v_NSD: jax.Array,
        asked: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `__call__`, for slots start + t of a cache, after those before them.

        A row sees nothing before its slot first_B. Returns the output [B, T, C], or of
        the one position t that is asked for [B, 1, C], and the cached keys and values
        with the new ones written in.
        """
        B, S, H = len(x_BTC), k_NSD.shape[1], self.config.n_head
        q_NTD, k_NTD, v_NTD = map(_heads_as_rows, self._project(x_BTC))
        k_NSD = jax.lax.dynamic_update_slice(k_NSD, k_NTD, (0, start, 0))
        v_NSD = jax.lax.dynamic_update_slice(v_NSD, v_NTD, (0, start, 0))
        if asked is not None:
            q_NTD = jax.lax.dynamic_slice_in_dim(q_NTD, asked, 1, axis=1)
            start += asked
        T = q_NTD.shape[1]
        slot_T1, slot_S = start + jnp.arange(T)[:, None], jnp.arange(S)
        # What is before the first token sees itself, since it must see something.
        own = slot_S >= jnp.repeat(first_B, H)[:, None, None]
        mask_NTS = (slot_S <= slot_T1) & (own | (slot_S == slot_T1))
        weights_NTS = self._weights(einsum("NSD,NTD->NTS", k_NSD, q_NTD), mask_NTS)
        out_NTD = einsum("NTS,NSD->NTD", weights_NTS, v_NSD, v_NSD.dtype)
        out_BTHD = out_NTD.reshape(B, H, T, -1).swapaxes(1, 2)
        return self._leave(out_BTHD, None), k_NSD, v_NSD

    def _fuses(self, rows_B: jax.Array | None) -> bool:
        """Whether cuDNN's attention, which keeps no scores, can do what is asked."""
        config = self.config
        return (
            config.fused_attention
            and runtime.has_fused_attention()
            and config.compute_dtype == "bfloat16"
            and config.head_dim <= 128
            and config.head_dim % 8 == 0
            and (rows_B is None or config.dropout == 0)
            and not self.is_mutable_collection("intermediates")  # which has the maps
        )

    def _project(self, x_BTC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv_BT3HD = constrain(
            self.c_attn(x_BTC), ("batch", "time", "qkv", "heads", "head_dim")
        )
        if runtime.on_cpu():  # where gradients are better joined than padded and summed
            q_BT1HD, k_BT1HD, v_BT1HD = jnp.split(qkv_BT3HD, 3, axis=2)
            return q_BT1HD[:, :, 0], k_BT1HD[:, :, 0], v_BT1HD[:, :, 0]
        return qkv_BT3HD[:, :, 0], qkv_BT3HD[:, :, 1], qkv_BT3HD[:, :, 2]

    def _attend(
        self,
        q_BTHD: jax.Array,
        k_BSHD: jax.Array,
        v_BSHD: jax.Array,
        mask: jax.Array,
        rows_B: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Averages the values, weighted by softmax of the scaled, masked scores.

        Returns the averages and the weights.
        """
        scores_BHTS = einsum("BSHD,BTHD->BHTS", k_BSHD, q_BTHD)
        weights_BHTS = self._weights(scores_BHTS, mask)
        dropped_BHTS = self.attn_dropout(weights_BHTS, rows_B)
        out_BTHD = einsum("BHTS,BSHD->BTHD", dropped_BHTS, v_BSHD, q_BTHD.dtype)
        return out_BTHD, weights_BHTS

    def _weights(self, scores: jax.Array, mask: jax.Array) -> jax.Array:
        """Softmax over the last axis of the scaled scores, of those that `mask` has."""
        scores = jnp.where(mask, scores * self.config.head_dim**-0.5, -jnp.inf)
        return jax.nn.softmax(scores).astype(self.config.compute_dtype)

    def _leave(self, x_BTHD: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        """Mixes the heads' averages."""
        x_BTHD = constrain(x_BTHD, ("batch", "time", "heads", "head_dim"))
        return self.resid_dropout(self.c_proj(x_BTHD), rows_B)


def gelu(x: jax.Array, kind: str) -> jax.Array:
    """GELU, "exact" or by "tanh".

    Source: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """
    if kind == "exact" and runtime.on_cpu():
        return _gelu_by_erf(x)
    if kind == "exact" and runtime.on_nvidia():
        # Computes again from the input what would else be kept in float32.
        return jax.checkpoint(_gelu_by_erf)(x)
    return nn.gelu(x, approximate=kind == "tanh")


def _gelu_by_erf(x: jax.Array) -> jax.Array:
    """PyTorch's formula. JAX's, by erfc, takes a CPU 2.6 times as long."""
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


class MLP(nn.Module):
    """Linear, GELU, Linear: each position on its own."""

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        C, F = config.n_embd, 4 * config.n_embd
        self.c_fc = Linear(
            config, "BTC,CF->BTF", (C, F), nn.initializers.normal(INIT_STD)
        )
        self.c_proj = Linear(config, "BTF,FC->BTC", (F, C), residual_init(config))
        self.dropout = Dropout(config.dropout)

    def __call__(self, x_BTC: jax.Array, rows_B: jax.Array | None) -> jax.Array:
        h_BTF = constrain(self.c_fc(x_BTC), ("batch", "time", "mlp"))
        h_BTF = gelu(h_BTF, self.config.gelu)
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
        start: jax.Array,
        first_B: jax.Array,
        k_NSD: jax.Array,
        v_NSD: jax.Array,
        asked: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `__call__`, with the cached keys and values of earlier positions."""
        out_BTC, k_NSD, v_NSD = self.attn.decode(
            self.ln_1(x_BTC), start, first_B, k_NSD, v_NSD, asked
        )
        if asked is not None:
            x_BTC = jax.lax.dynamic_slice_in_dim(x_BTC, asked, 1, axis=1)
        x_BTC = x_BTC + out_BTC
        return x_BTC + self.mlp(self.ln_2(x_BTC), None), k_NSD, v_NSD
