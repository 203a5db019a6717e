"""What holds for every Transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE_ROW, TINY, build, dropped_logits, logits_of, random_params

from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.models.lecture import BLOCKS
from jaxgpt.run import crop_block_size

T = TINY.model.block_size


@pytest.fixture(scope="module", params=["gpt", *BLOCKS])
def any_model(request, tiny_model):
    """A Transformer of two layers, and parameters of it that are not small."""
    if request.param == "gpt":
        return tiny_model
    model = build(architecture=request.param)
    return model, random_params(model, mean=0, std=0.25)


def test_future_tokens_do_not_change_past_logits(any_model):
    before = logits_of(*any_model, ONE_ROW)
    for t in range(T):
        after = logits_of(*any_model, np.where(np.arange(T) == t, 7, ONE_ROW))
        np.testing.assert_array_equal(before[0, :t], after[0, :t])
        assert not np.allclose(before[0, t], after[0, t])


def test_more_tokens_than_positions_are_an_error(any_model):
    with pytest.raises(ValueError, match=r"9 tokens .*block_size=8"):
        logits_of(*any_model, np.zeros((1, T + 1), np.int32))


def test_a_model_cropped_to_fewer_positions_has_the_same_logits_on_shorter_text(
    any_model,
):
    model, params = any_model
    shorter = build_model(dataclasses.replace(model.config, block_size=5), "cpu")
    cropped = crop_block_size(params, 5)
    shapes = jax.tree.map(jnp.shape, parameter_shapes(shorter.config))
    assert jax.tree.map(jnp.shape, cropped) == shapes
    expected = logits_of(model, params, ONE_ROW)[:, :5]
    found = logits_of(shorter, cropped, ONE_ROW[:, :5])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dropout_is_a_function_of_the_row_and_off_by_default(any_model):
    tokens_BT = jnp.tile(ONE_ROW, (4, 1))
    whole = dropped_logits(*any_model, tokens_BT, None)
    part = dropped_logits(*any_model, tokens_BT[:2], jnp.array([3, 1]))
    np.testing.assert_allclose(part, whole[jnp.array([3, 1])], atol=1e-5)
    assert not np.allclose(whole[0], whole[1])  # the same tokens, other masks
    off = logits_of(*any_model, ONE_ROW)
    assert not np.allclose(whole[0], off[0])
