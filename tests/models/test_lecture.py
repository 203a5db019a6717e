import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import (
    ONE_ROW,
    build,
    changed,
    dropped_logits,
    init_model,
    logits_of,
    random_params,
)
from numpy_lecture import logits as numpy_logits

from jaxgpt.models import parameter_shapes
from jaxgpt.models.lecture import (
    BLOCKS,
    Head,
    average_by_attention,
    average_by_loop,
    average_by_matrix,
    average_by_softmax,
)
from jaxgpt.presets import PRESETS


def test_the_bigram_model_is_a_table_of_logits(bigram):
    model, params = bigram
    tokens_BT = jnp.array([[3, 1, 3], [1, 0, 10]])
    table = params["table"]["embedding"]
    assert table.shape == (11, 11)
    assert 0.8 < table.std() < 1.2  # PyTorch's N(0, 1), as in the lecture
    logits_BTV = logits_of(model, params, tokens_BT)
    np.testing.assert_array_equal(logits_BTV, table[tokens_BT])


@pytest.mark.parametrize(
    "average",
    [average_by_loop, average_by_matrix, average_by_softmax, average_by_attention],
)
def test_all_ways_to_average_the_past_give_the_running_mean(average):
    x_BTC = np.random.default_rng(0).normal(size=(4, 8, 2)).astype(np.float32)
    means_BTC = x_BTC.cumsum(axis=1) / np.arange(1, 9)[:, None]
    np.testing.assert_allclose(average(jnp.array(x_BTC)), means_BTC, atol=1e-6)


@pytest.mark.parametrize("n_head", [1, 4])
@pytest.mark.parametrize("architecture", BLOCKS)
def test_logits_are_those_of_the_lectures_definition_in_numpy(architecture, n_head):
    model = build(architecture=architecture, n_layer=3, n_head=n_head)
    params = random_params(model)
    expected = numpy_logits(params, ONE_ROW[0], architecture, n_layer=3)
    logits = logits_of(model, params, ONE_ROW)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_initial_parameters_are_spread_as_pytorchs():
    shape = {"n_embd": 64, "vocab_size": 200, "block_size": 128}
    _, params = init_model(architecture="layer-norm", **shape)
    for table in (params["token_embedding"], params["position_embedding"]):
        assert table["embedding"].mean() == pytest.approx(0, abs=0.05)
        assert table["embedding"].std() == pytest.approx(1, rel=0.05)
    block = params["block_0"]
    heads, mlp = block["sa"]["multi_head"]["heads"], block["ffwd"]
    narrow = *heads.values(), block["sa"]["proj"], mlp["fc"], params["lm_head"]
    for layer, inputs in [*((layer, 64) for layer in narrow), (mlp["proj"], 256)]:
        for values in layer.values():  # kernel and, but for the heads, bias
            bound = inputs**-0.5
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert heads.keys() == {"key", "query", "value"}
    assert "bias" not in heads["key"]
    assert not np.allclose(*heads["key"]["kernel"][:2])  # heads differ
    other = params["block_1"]["ffwd"]["fc"]["kernel"]
    assert not np.allclose(mlp["fc"]["kernel"], other)  # layers differ


def test_parameters_are_as_many_as_in_the_lecture():
    counts = []
    for name in PRESETS:
        if name.startswith("lecture-"):
            config = changed(PRESETS[name](), model={"vocab_size": 65}).model
            leaves = jax.tree.leaves(parameter_shapes(config))
            counts.append(sum(leaf.size for leaf in leaves))
    ends = 65 * 32 + 8 * 32 + 32 * 65 + 65  # both embeddings, and the head
    qkv, proj, mlp = 3 * 32 * 32, 32 * 32 + 32, 8 * 32 * 32 + 5 * 32
    first = [65 * 65, ends + qkv, ends + qkv, ends + qkv + proj]
    deep = ends + 3 * (qkv + proj)  # of 3 blocks, with an MLP, and with LayerNorm
    norms = (2 * 3 + 1) * 2 * 32
    scaled = 10_788_929  # as the lecture's program prints
    assert counts == [*first, deep, deep + 3 * mlp, deep + 3 * mlp + norms, scaled]


def test_each_head_draws_its_own_dropout_mask():
    model = build(architecture="attention", n_head=4, n_layer=1, dropout=0.5)
    _, sown = model.apply(
        {"params": random_params(model)},
        jnp.tile(ONE_ROW, (8, 1)),
        deterministic=False,
        rngs={"dropout": jax.random.key(1)},
        mutable="intermediates",
        capture_intermediates=lambda module, _: isinstance(module, Head),
    )
    out_BHTD = sown["intermediates"]["block_0"]["heads"]["__call__"][0]
    # The first position has but one weight: where it is dropped nothing is left.
    kept_BH = np.abs(out_BHTD[:, :, 0]).max(axis=-1) > 0
    assert (kept_BH.any(axis=1) & ~kept_BH.all(axis=1)).any()


@pytest.mark.parametrize("architecture", ["residual", "layer-norm"])
def test_both_projections_apply_dropout_to_what_they_add(architecture):
    shape = {"n_layer": 1, "n_embd": 64, "vocab_size": 64}
    model = build(architecture=architecture, dropout=0.5, **shape)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    for half in ("sa", "ffwd"):
        params["block_0"][half]["proj"]["bias"] += 1.0
    if architecture == "layer-norm":
        params["ln_f"]["scale"] += 1.0
    params["lm_head"]["kernel"] += jnp.eye(64)  # shows the stream as it is
    stream_C = dropped_logits(model, params, ONE_ROW, None)[0, 0]
    levels = np.unique(np.round(stream_C, 3))
    assert len(levels) == 3  # added by neither half, by one, by both
