import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, dropped_logits
from numpy_lecture import logits as numpy_logits

from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.models.lecture import (
    BLOCKS,
    Head,
    attention_scores,
    attention_weights,
    average_by_attention,
    average_by_loop,
    average_by_matrix,
    average_by_softmax,
)
from jaxgpt.presets import PRESETS

ONE_ROW = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def init(architecture, **model):
    """A model of the ladder and its initial parameters."""
    fields = {"architecture": architecture, "dropout": 0.0, **model}
    model = build_model(changed(TINY, model=fields).model, "cpu")
    return model, model.init(jax.random.key(0), ONE_ROW)["params"]


def test_the_bigram_model_is_a_table_of_logits(bigram):
    model, params = bigram
    tokens = jnp.array([[3, 1, 3], [1, 0, 10]])
    table = params["table"]["embedding"]
    assert table.shape == (11, 11)
    assert 0.8 < table.std() < 1.2  # PyTorch's N(0, 1), as in the lecture
    np.testing.assert_array_equal(
        model.apply({"params": params}, tokens), table[tokens]
    )


def test_four_ways_to_average_the_past_agree():
    x_BTC = jax.random.normal(jax.random.key(0), (4, 8, 2))
    means = np.array([x_BTC[:, : t + 1].sum(axis=1) / (t + 1) for t in range(8)])
    for average in (
        average_by_loop,
        average_by_matrix,
        average_by_softmax,
        average_by_attention,
    ):
        np.testing.assert_allclose(
            average(x_BTC), means.swapaxes(0, 1), atol=1e-6, err_msg=average.__name__
        )


@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_scaling_keeps_scores_at_variance_one_and_softmax_spread(head_dim):
    q_key, k_key = jax.random.split(jax.random.key(0))
    q_BTD = jax.random.normal(q_key, (8, 64, head_dim))
    k_BSD = jax.random.normal(k_key, (8, 64, head_dim))
    raw_BTS = q_BTD @ k_BSD.swapaxes(1, 2)
    scaled_BTS = attention_scores(q_BTD, k_BSD)
    assert raw_BTS.var() == pytest.approx(head_dim, rel=0.1)
    assert scaled_BTS.var() == pytest.approx(1, rel=0.1)
    # What a position gives to its favourite among 64 others, on average.
    raw, scaled = (jax.nn.softmax(s).max(axis=-1).mean() for s in (raw_BTS, scaled_BTS))
    assert scaled < 0.2
    assert raw > {16: 0.4, 64: 0.7, 256: 0.85}[head_dim]
    # And the weights of a head come from the scaled ones.
    last_BS = attention_weights(q_BTD, k_BSD)[:, -1]
    np.testing.assert_allclose(last_BS, jax.nn.softmax(scaled_BTS[:, -1]), rtol=1e-4)


@pytest.mark.parametrize("n_head", [1, 4])
@pytest.mark.parametrize("architecture", BLOCKS)
def test_logits_are_those_of_the_lectures_definition_in_numpy(architecture, n_head):
    model, params = init(architecture, n_layer=3, n_head=n_head)
    rng = np.random.default_rng(1)
    params = jax.tree.map(  # nothing at zero, or at one
        lambda a: rng.normal(0.2, 0.4, a.shape).astype(np.float32), params
    )
    expected = numpy_logits(
        jax.tree.map(lambda a: np.asarray(a, np.float64), params),
        ONE_ROW[0],
        architecture,
        n_layer=3,
    )
    logits = model.apply({"params": params}, ONE_ROW)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_initial_parameters_are_spread_as_pytorchs():
    _, params = init("layer-norm", n_embd=64, vocab_size=200, block_size=128)
    for table in (params["token_embedding"], params["position_embedding"]):
        assert table["embedding"].mean() == pytest.approx(0, abs=0.05)
        assert table["embedding"].std() == pytest.approx(1, rel=0.05)
    block = params["block_0"]
    heads = block["sa"]["multi_head"]["heads"]
    for layer, inputs in (
        *((heads[name], 64) for name in ("key", "query", "value")),
        (block["sa"]["proj"], 64),
        (block["ffwd"]["fc"], 64),
        (block["ffwd"]["proj"], 256),
        (params["lm_head"], 64),
    ):
        for values in layer.values():  # kernel and, but for the heads, bias
            bound = inputs**-0.5
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert "bias" not in heads["key"]
    assert not np.allclose(*heads["key"]["kernel"][:2])  # heads differ
    other = params["block_1"]["ffwd"]["fc"]["kernel"]
    assert not np.allclose(block["ffwd"]["fc"]["kernel"], other)  # layers differ


def test_parameters_are_as_many_as_the_lecture_says():
    counts = {}
    for name in PRESETS:
        if name.startswith("lecture-"):
            config = changed(PRESETS[name](), model={"vocab_size": 65}).model
            leaves = jax.tree.leaves(parameter_shapes(config))
            counts[name] = sum(leaf.size for leaf in leaves)
    ends = 65 * 32 + 8 * 32 + 32 * 65 + 65  # both embeddings, and the head
    qkv, proj, mlp = 3 * 32 * 32, 32 * 32 + 32, 8 * 32 * 32 + 5 * 32
    assert counts == {
        "lecture-bigram": 65 * 65,
        "lecture-single-head": ends + qkv,
        "lecture-multi-head": ends + qkv,
        "lecture-feed-forward": ends + qkv + proj,
        "lecture-blocks": ends + 3 * (qkv + proj),
        "lecture-residual": ends + 3 * (qkv + proj + mlp),
        "lecture-layer-norm": ends + 3 * (qkv + proj + mlp + 2 * 64) + 64,
        "lecture-scaled": 10_788_929,  # as its program prints
    }


def test_each_head_drops_weights_of_its_own():
    model, params = init("attention", n_head=4, n_layer=1, dropout=0.5)
    _, sown = model.apply(
        {"params": params},
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
def test_both_projections_drop_what_they_add_to_the_stream(architecture):
    shape = {"n_layer": 1, "n_embd": 64, "vocab_size": 64, "dropout": 0.5}
    model, params = init(architecture, **shape)
    params = jax.tree.map(jnp.zeros_like, params)
    for half in ("sa", "ffwd"):
        params["block_0"][half]["proj"]["bias"] += 1.0
    if architecture == "layer-norm":
        params["ln_f"]["scale"] += 1.0
    params["lm_head"]["kernel"] += jnp.eye(64)  # shows the stream as it is
    stream_C = dropped_logits(model, params, ONE_ROW, None)[0, 0]
    levels = np.unique(np.round(stream_C, 3))
    assert len(levels) == 3  # added by neither half, by one, by both
