"""Attention: each query averages the values of the keys visible to it.

B batch   T time (queries)   S time (keys)   H heads   D head_dim   N row-head pairs

Source: "Attention Is All You Need", section 3.2.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from jaxgpt.ops.dropout import Drop
from jaxgpt.ops.matmul import einsum

# Number of query blocks in causal attention, each of which skips all later keys. Four
# save 3/8 of the work: 2 CPU cores train the 10.8M model 1.2 times as fast.
# GPUs have larger blocks: for an H100, XLA compiles the step of that model into 447
# kernels in 17 s, and with blocks of 64 into 690, which move as many bytes, in 26 s.
BLOCKS = 4
SMALLEST_BLOCK = {"cpu": 64, "tpu": 64, "cuda": 256, "gpu": 256}


@flax.struct.dataclass
class Mask:
    """Which keys each query attends to; there must be at least one for each query.

    Attributes:
      causal: whether keys after the query's own position are masked.
      positions_BT: positions of the queries among the keys, i32; 0 to T - 1 if None.
      lengths_B: keys in each row before the right padding, i32; S if None.
      segments_BS: segment ids of the keys, i32; a query attends only to keys of the
        segment at its own position.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=True)
    positions_BT: Array | None = None
    lengths_B: Array | None = None
    segments_BS: Array | None = None

    def visible(self, T: int, S: int) -> Array:
        """Whether each query attends to each key, bool [B or 1, 1, T, S]."""
        key_S, query_BT = jnp.arange(S), self.positions_BT
        query_BT = jnp.arange(T)[None] if query_BT is None else query_BT
        visible_BTS = (key_S <= query_BT[..., None]) | (not self.causal)
        if self.lengths_B is not None:
            visible_BTS &= key_S < self.lengths_B[:, None, None]
        if self.segments_BS is not None:
            segments_BT = jnp.take_along_axis(self.segments_BS, query_BT, axis=1)
            visible_BTS &= segments_BT[..., None] == self.segments_BS[:, None]
        return visible_BTS[:, None]


def attention_weights(q_BTHD: Array, k_BSHD: Array, mask: Mask, platform: str) -> Array:
    """Softmax of q k / sqrt(D) over the visible keys, [B, H, T, S] in q's dtype."""
    scores_BHTS = einsum("BSHD,BTHD->BHTS", k_BSHD, q_BTHD, jnp.float32, platform)
    return _masked_softmax(scores_BHTS, mask, q_BTHD)


def _masked_softmax(scores_BHTS: Array, mask: Mask, q_BTHD: Array) -> Array:
    scores_BHTS = scores_BHTS * q_BTHD.shape[-1] ** -0.5
    visible = mask.visible(*scores_BHTS.shape[2:])
    weights_BHTS = jax.nn.softmax(jnp.where(visible, scores_BHTS, -jnp.inf))
    return weights_BHTS.astype(q_BTHD.dtype)


def plain_attention(
    q_BTHD: Array, k_BSHD: Array, v_BSHD: Array, mask: Mask, drop: Drop, platform: str
) -> Array:
    """Averages the values by `attention_weights` after dropout, [B, T, H, D]."""
    weights_BHTS = attention_weights(q_BTHD, k_BSHD, mask, platform)
    weights_BHTS = drop(weights_BHTS) if drop else weights_BHTS
    return einsum("BHTS,BSHD->BTHD", weights_BHTS, v_BSHD, v_BSHD.dtype, platform)


def _blocked_attention(
    q_BTHD: Array, k_BTHD: Array, v_BTHD: Array, mask: Mask, drop: Drop, platform: str
) -> Array:
    """Causal attention, one block of queries at a time."""
    T = q_BTHD.shape[1]
    size = max(SMALLEST_BLOCK[platform], -(-T // BLOCKS))
    starts, out = list(range(0, T, size)), []
    prefixes = (_prefixes(a, starts, platform) for a in (k_BTHD, v_BTHD))
    for start, k_BSHD, v_BSHD in zip(starts, *prefixes, strict=True):
        positions_T, segments_BS = jnp.arange(start, min(start + size, T)), None
        if mask.segments_BS is not None:
            segments_BS = mask.segments_BS[:, : start + size]
        block_mask = Mask(True, positions_T[None], mask.lengths_B, segments_BS)
        block_drop = drop and partial(drop, start=(0, start, 0))
        block = q_BTHD[:, start : start + size], k_BSHD, v_BSHD
        out.append(plain_attention(*block, block_mask, block_drop, platform))
    return jnp.concatenate(out, axis=1)


def _prefixes(x_BTHD: Array, starts: list[int], platform: str) -> list[Array]:
    """Returns for each block all positions up to its end, [B, S, H, D]."""
    if platform != "cpu":
        return [x_BTHD[:, :end] for end in (*starts[1:], None)]
    # Gradients of slices are zero-padded arrays; summing them costs 10% of a CPU step.
    blocks = jnp.split(x_BTHD, starts[1:], axis=1)
    return [jnp.concatenate(blocks[: i + 1], axis=1) for i in range(len(starts))]


def attention(
    q_BTHD: Array,
    k_BSHD: Array,
    v_BSHD: Array,
    mask: Mask,
    drop: Drop,
    platform: str,
    fused: bool = True,
) -> Array:
    """`plain_attention`, by the fastest implementation; cuDNN only if `fused`.

    `drop` has the shape bound of which the weights of a row, [H, T, S], are a block.
    """
    qkv, head_dim = (q_BTHD, k_BSHD, v_BSHD), q_BTHD.shape[-1]
    fits = q_BTHD.dtype == jnp.bfloat16 and head_dim <= 128 and head_dim % 8 == 0
    standard_mask = mask.positions_BT is None
    standard_mask &= q_BTHD.shape == k_BSHD.shape or not mask.causal
    fits &= standard_mask and mask.segments_BS is None
    if platform == "cuda" and fused and fits and not drop:
        cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
        return cudnn(*qkv, is_causal=mask.causal, key_value_seq_lengths=mask.lengths_B)
    attend = _blocked_attention if mask.causal and standard_mask else plain_attention
    return attend(*qkv, mask, drop, platform)


# One layer's cached keys and values, [N, S, D] each. XLA would copy a 4D cache.
KV = tuple[Array, Array]


def _merge_batch_and_heads(x_BTHD: Array) -> Array:
    B, T, H, D = x_BTHD.shape
    return x_BTHD.swapaxes(1, 2).reshape(B * H, T, D)


def update_cache(cache: KV, new: KV, start_B: Array) -> KV:
    """Writes new keys and values [B, T, H, D] into each row, starting at start_B."""
    write = partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)

    def write_rows(old_NSD: Array, new_BTHD: Array) -> Array:
        rows, new_NTD = len(start_B), _merge_batch_and_heads(new_BTHD)
        if rows == 1:  # for a scatter of one row, XLA would copy the cache
            return write(old_NSD, new_NTD, start_B[0])
        old, new = (a.reshape(rows, -1, *a.shape[1:]) for a in (old_NSD, new_NTD))
        return jax.vmap(write)(old, new, start_B).reshape(old_NSD.shape)

    return write_rows(cache[0], new[0]), write_rows(cache[1], new[1])


def cached_attention(q_BTHD: Array, cache: KV, mask: Mask, platform: str) -> Array:
    """`plain_attention` over cached keys and values, without dropout."""
    (B, T, H, D), (k_NSD, v_NSD) = q_BTHD.shape, cache
    q_NTD = _merge_batch_and_heads(q_BTHD)
    scores_NTS = einsum("NSD,NTD->NTS", k_NSD, q_NTD, jnp.float32, platform)
    weights_BHTS = _masked_softmax(scores_NTS.reshape(B, H, T, -1), mask, q_BTHD)
    weights_NTS = weights_BHTS.reshape(scores_NTS.shape)
    out_NTD = einsum("NTS,NSD->NTD", weights_NTS, v_NSD, q_BTHD.dtype, platform)
    return out_NTD.reshape(B, H, T, D).swapaxes(1, 2)
