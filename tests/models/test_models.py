"""What holds for every Transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, dropped_logits

from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.run import crop_block_size

T = TINY.model.block_size
ONE_ROW = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])
TRANSFORMERS = ("gpt", "attention", "feed-forward", "residual", "layer-norm")


@pytest.fixture(scope="module", params=TRANSFORMERS)
def any_model(request, tiny_model):
    """A Transformer of two layers, and parameters of it that are not small."""
    if request.param == "gpt":
        return tiny_model
    model = build_model(
        changed(TINY, model={"architecture": request.param}).model, "cpu"
    )
    return model, model.init(jax.random.key(0), ONE_ROW)["params"]


def test_future_tokens_do_not_change_past_logits(any_model):
    model, params = any_model
    before = model.apply({"params": params}, ONE_ROW)
    for t in range(T):
        after = model.apply({"params": params}, ONE_ROW.at[0, t].set(7))
        np.testing.assert_array_equal(before[0, :t], after[0, :t])
        assert not np.allclose(before[0, t], after[0, t])


def test_more_tokens_than_positions_are_an_error(any_model):
    model, params = any_model
    with pytest.raises(ValueError, match="9 tokens do not fit block_size=8"):
        model.apply({"params": params}, jnp.zeros((1, T + 1), jnp.int32))


def test_cropped_to_fewer_positions_a_model_is_the_same_on_shorter_text(any_model):
    model, params = any_model
    shorter = build_model(dataclasses.replace(model.config, block_size=5), "cpu")
    np.testing.assert_allclose(
        shorter.apply({"params": crop_block_size(params, 5)}, ONE_ROW[:, :5]),
        model.apply({"params": params}, ONE_ROW[:, :5]),
        atol=1e-6,
    )
    shapes = parameter_shapes(shorter.config)
    cropped = crop_block_size(params, 5)
    assert jax.tree.map(jnp.shape, cropped) == jax.tree.map(jnp.shape, shapes)


def test_dropout_follows_the_row_wherever_it_stands(any_model):
    model, params = any_model
    tokens = jnp.tile(ONE_ROW, (4, 1))
    whole = dropped_logits(model, params, tokens, jnp.arange(4))
    part = dropped_logits(model, params, tokens[:2], jnp.array([3, 1]))
    np.testing.assert_allclose(part, whole[jnp.array([3, 1])], atol=1e-5)
    assert not np.allclose(whole[0], whole[1])  # the same tokens, other masks
    np.testing.assert_array_equal(whole, dropped_logits(model, params, tokens, None))


def test_dropout_is_off_unless_asked_for(any_model):
    model, params = any_model
    off = model.apply({"params": params}, ONE_ROW)
    np.testing.assert_array_equal(off, model.apply({"params": params}, ONE_ROW))
    assert not np.allclose(off, dropped_logits(model, params, ONE_ROW, None))
