import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import PLATFORMS

from jaxgpt import ops
from jaxgpt.ops.attention import Mask, plain_attention

B, H, D = 2, 3, 8


def qkv_and_weights(T, S=None):
    """Random queries, keys, values, and the weights of a sum over the output."""
    rng = np.random.default_rng(T)
    shapes = [(B, length, H, D) for length in (T, S or T, S or T, T)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@partial(jax.jit, static_argnames=("attend", "platform"))
def value_and_gradient(
    qkv, weights, mask, keys_B=None, attend=ops.attention, platform="cpu"
):
    """The output, and the gradients of queries, keys and values."""
    drop, (T, H), S = None, qkv[0].shape[1:3], qkv[1].shape[1]
    if keys_B is not None:
        drop = partial(ops.dropout, 0.3, keys_B, shape=(H, T, S))

    def total(*qkv):
        out = attend(*qkv, mask, drop, platform)
        return (out * weights).sum(), out

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*qkv)
    return out, *grads


def pytorchs(qkv, weights, visible):
    """The same by PyTorch's scaled_dot_product_attention."""
    leaves = [torch.tensor(a, requires_grad=True) for a in qkv]
    q, k, v = (a.transpose(1, 2) for a in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, torch.tensor(visible)
    ).transpose(1, 2)
    (out * torch.tensor(weights)).sum().backward()
    return [a.detach().numpy() for a in (out, *(leaf.grad for leaf in leaves))]


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


LENGTHS_B = np.array([70, 3])
MASKS = {
    "causal": Mask(),
    "lengths": Mask(lengths_B=LENGTHS_B),
    "positions": Mask(positions_BT=np.arange(70)[None] + np.array([[0], [20]])),
    "segments": Mask(segments_BS=np.arange(2 * 70).reshape(2, 70) // 13),
    "segments at positions": Mask(
        positions_BT=np.arange(70)[None] + np.array([[0], [20]]),
        segments_BS=np.arange(2 * 90).reshape(2, 90) // 13,
    ),
    "all": Mask(causal=False),
    "all within lengths": Mask(causal=False, lengths_B=LENGTHS_B),
}


def visible_by_hand(mask, T, S):
    """The mask as its documentation says it, one query and key at a time."""
    visible = np.zeros((B, 1, T, S), bool)
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        at = t if mask.positions_BT is None else mask.positions_BT[b, t]
        segments_S = None if mask.segments_BS is None else mask.segments_BS[b]
        visible[b, 0, t, s] = (
            (not mask.causal or s <= at)
            and (mask.lengths_B is None or s < mask.lengths_B[b])
            and (segments_S is None or segments_S[at] == segments_S[s])
        )
    return visible


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("name", "T", "S"),
    [
        # From one block to four.
        *(("causal", T, T) for T in (1, 7, 64, 130, 256, 320)),
        *((name, 70, 70) for name in ("lengths", "segments")),
        *((name, 70, 90) for name in MASKS if name not in ("lengths", "segments")),
    ],
)
def test_attention_is_pytorchs_on_every_platform_and_with_every_mask(
    platform, name, T, S
):
    *qkv, weights = qkv_and_weights(T, S)
    visible = visible_by_hand(MASKS[name], T, S)
    assert 0 < visible.mean() <= 1
    found = value_and_gradient(qkv, weights, MASKS[name], platform=platform)
    assert_all_close(found, pytorchs(qkv, weights, visible))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("T", "S"), [(5, 5), (130, 130), (320, 320), (130, 70)])
def test_attention_drops_the_same_weights_on_every_platform(platform, T, S):
    *qkv, weights = qkv_and_weights(T, S)
    arguments = qkv, weights, Mask(), jax.random.split(jax.random.key(9), B)
    found = value_and_gradient(*arguments, platform=platform)
    expected = value_and_gradient(*arguments, attend=plain_attention)
    assert_all_close(found, expected)
    undropped = value_and_gradient(*arguments[:3], attend=plain_attention)
    assert not np.allclose(expected[0], undropped[0], atol=0.1)


@pytest.mark.parametrize("name", ["causal", "lengths", "all", "all within lengths"])
def test_cudnn_is_given_what_the_definition_means(monkeypatch, name):
    """In bfloat16, JAX's own implementation stands for cuDNN's, which needs a GPU."""
    attention = jax.nn.dot_product_attention
    implementations = []

    def instead(*qkv, implementation, **options):
        implementations.append(implementation)
        return attention(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    *qkv, weights = (a.astype(jnp.bfloat16) for a in qkv_and_weights(90))
    found, expected = (
        value_and_gradient(qkv, weights, MASKS[name], platform=platform)
        for platform in ("cuda", "cpu")
    )
    assert implementations == ["cudnn"]
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_cudnn_is_not_given_segments(monkeypatch):
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)
    *qkv, weights = (a.astype(jnp.bfloat16) for a in qkv_and_weights(70))
    assert value_and_gradient(qkv, weights, MASKS["segments"], platform="cuda")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("starts", [[4, 4], [0, 6], [5]])
def test_a_cache_gives_each_row_the_attention_to_all_that_it_holds(platform, starts):
    rows, T, S = len(starts), 3, 9
    q, k, v, weights = (a[:rows] for a in qkv_and_weights(S))
    start_B, own_BT = np.array(starts), np.array(starts)[:, None] + np.arange(T)
    index = own_BT[..., None, None]
    new = [np.take_along_axis(a, index, 1) for a in (q, k + 1, v + 1)]

    @jax.jit
    def cached(start_B, own_BT):
        cache = (jnp.zeros((rows * H, S, D)),) * 2
        cache = ops.update_cache(cache, (k, v), np.zeros(rows, int))
        cache = ops.update_cache(cache, new[1:], start_B)
        return ops.cached_attention(new[0], cache, Mask(positions_BT=own_BT), platform)

    for old, late in zip((k, v), new[1:], strict=True):
        np.put_along_axis(old, index, late, 1)
    visible = np.arange(S) <= own_BT[:, None, :, None]
    expected, *_ = pytorchs((new[0], k, v), weights[:, :T], visible)
    np.testing.assert_allclose(cached(start_B, own_BT), expected, atol=2e-6)
