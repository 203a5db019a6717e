import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgpt import ops
from jaxgpt.ops.attention import Mask, plain_attention

B, H, D = 2, 3, 8
PLATFORMS = ("cpu", "tpu", "cuda", "gpu")


def drawn(T, S=None):
    """Queries, keys and values, and the weights of a sum over the output."""
    shapes = [(B, length, H, D) for length in (T, S or T, S or T, T)]
    keys = jax.random.split(jax.random.key(T), 4)
    return [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]


def value_and_gradient(attend, q, k, v, weights):
    """The output, and the gradients of queries, keys and values."""

    def total(q, k, v):
        out = attend(q, k, v)
        return (out * weights).sum(), out

    (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def pytorchs(q, k, v, weights, visible):
    """The same by PyTorch's scaled_dot_product_attention."""
    leaves = [torch.tensor(np.asarray(a), requires_grad=True) for a in (q, k, v)]
    q, k, v = (a.transpose(1, 2) for a in leaves)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, torch.tensor(np.asarray(visible))
    ).transpose(1, 2)
    (out * torch.tensor(np.asarray(weights))).sum().backward()
    return [a.detach().numpy() for a in (out, *(leaf.grad for leaf in leaves))]


def assert_all_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("T", [1, 7, 64, 130, 256])  # from one block to four
def test_every_form_of_causal_attention_is_pytorchs(platform, T):
    qkv_and_weights = drawn(T)
    visible = np.tril(np.ones((T, T), bool))
    attend = partial(ops.attention, mask=Mask(), drop=None, platform=platform)
    found = value_and_gradient(attend, *qkv_and_weights)
    assert_all_close(found, pytorchs(*qkv_and_weights, visible))


LENGTHS_B = np.array([70, 3])
MASKS = {
    "causal": Mask(),
    "lengths": Mask(lengths_B=LENGTHS_B),
    "positions": Mask(positions_BT=np.arange(70)[None] + np.array([[0], [20]])),
    "segments": Mask(segments_BS=np.arange(2 * 90).reshape(2, 90) // 13),
    "all": Mask(causal=False),
    "all within lengths": Mask(causal=False, lengths_B=LENGTHS_B),
}


def visible_by_hand(mask, T, S):
    """The mask as its documentation says it, one query and key at a time."""
    visible = np.zeros((B, 1, T, S), bool)
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        at = t if mask.positions_BT is None else mask.positions_BT[b, t]
        visible[b, 0, t, s] = (
            (not mask.causal or s <= at)
            and (mask.lengths_B is None or s < mask.lengths_B[b])
            and (
                mask.segments_BS is None
                or mask.segments_BS[b, t] == mask.segments_BS[b, s]
            )
        )
    return visible


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_hides_what_it_says(platform, name):
    mask, T, S = MASKS[name], 70, 90
    if name in ("lengths", "segments"):  # of as many queries as keys, in blocks too
        T = S
    qkv_and_weights = drawn(T, S)
    visible = visible_by_hand(mask, T, S)
    assert 0 < visible.mean() <= 1
    attend = partial(ops.attention, mask=mask, drop=None, platform=platform)
    found = value_and_gradient(attend, *qkv_and_weights)
    assert_all_close(found, pytorchs(*qkv_and_weights, visible))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("T", "S"), [(5, 5), (130, 130), (256, 256), (130, 70)])
def test_every_form_drops_the_same_weights(platform, T, S):
    keys_B = jax.random.split(jax.random.key(9), B)
    options = {"mask": Mask(), "drop": partial(ops.dropout, 0.3, keys_B)}
    *found, expected, undropped = (
        value_and_gradient(partial(attend, **options | more), *drawn(T, S))
        for attend, more in [
            (ops.attention, {"platform": platform}),
            (plain_attention, {"platform": "cpu"}),
            (plain_attention, {"platform": "cpu", "drop": None}),
        ]
    )
    assert_all_close(*found, expected)
    assert not np.allclose(expected[0], undropped[0], atol=0.1)


@pytest.mark.parametrize("name", ["causal", "lengths", "all", "all within lengths"])
def test_cudnn_is_given_what_the_definition_means(monkeypatch, name):
    """In bfloat16, JAX's own implementation stands for cuDNN's, which needs a GPU."""
    attention = jax.nn.dot_product_attention
    asked = []

    def instead(*qkv, implementation, **options):
        asked.append(implementation)
        return attention(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    *qkv, weights = (a.astype(jnp.bfloat16) for a in drawn(90))
    found, expected = (
        value_and_gradient(
            partial(ops.attention, mask=MASKS[name], drop=None, platform=platform),
            *qkv,
            weights,
        )
        for platform in ("cuda", "cpu")
    )
    assert asked == ["cudnn"]
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("starts", [[4, 4], [0, 6], [5]])
def test_a_cache_gives_each_row_the_attention_to_all_it_has_read(platform, starts):
    rows, T, S = len(starts), 3, 9
    q, k, v, _ = (a[:rows] for a in drawn(S))
    cache = (np.zeros((rows * H, S, D), np.float32),) * 2
    start_B, own = np.array(starts), np.array(starts)[:, None] + np.arange(T)
    late = [np.take_along_axis(a, own[..., None, None], 1) for a in (q, k + 1, v + 1)]
    cache = ops.update(cache, (k, v), np.zeros(rows, int))
    cache = ops.update(cache, late[1:], start_B)
    mask = Mask(positions_BT=own)
    out = ops.cached_attention(late[0], cache, mask, platform)
    for row, start in enumerate(starts):
        end = start + T
        keys, values = (
            jnp.concatenate([a[row, :start], b[row]])[None]
            for a, b in zip((k, v), late[1:], strict=True)
        )
        alone = Mask(positions_BT=np.arange(start, end)[None])
        query = late[0][row : row + 1]
        expected = plain_attention(query, keys, values, alone, None, "cpu")
        np.testing.assert_allclose(out[row], expected[0], atol=2e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_unpacked_queries_keys_and_values_have_the_gradients_of_slices(platform):
    packed, weights = jax.random.normal(jax.random.key(0), (2, B, 5, 3, H, D))

    def total(packed, parts):
        return sum(
            (i + 1) * (a * weights[:, :, i]).sum() for i, a in enumerate(parts(packed))
        )

    def slices(packed):
        return [packed[:, :, i] for i in range(3)]

    found, expected = (
        jax.value_and_grad(partial(total, parts=parts))(packed)
        for parts in (partial(ops.unpack, platform=platform), slices)
    )
    assert_all_close(found, expected)
