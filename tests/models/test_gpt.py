import math
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY, changed, dropped_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_gpt import logits as numpy_logits

from jaxgpt.generation.decode import generate_tokens, unstack_layers
from jaxgpt.models import build_model
from jaxgpt.ops import cross_entropy
from jaxgpt.presets import PRESETS
from jaxgpt.training.objectives import Context, next_token

blocks = import_module("jaxgpt.ops.attention")  # a function has its name

T = TINY.model.block_size
V = TINY.model.vocab_size
ONE_ROW = jnp.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def init(**model):
    """A model like TINY's with some fields changed, and its initial parameters."""
    model = build_model(changed(TINY, model=model).model, "cpu")
    return model, model.init(jax.random.key(0), ONE_ROW[:, :1])["params"]


def randomised(params):
    """Parameters of the same shapes, with nothing at zero, or at one."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: rng.normal(0.2, 0.4, a.shape).astype(np.float32), params
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gelu", ["exact", "tanh"])
def test_logits_are_those_of_nanogpts_definition_in_numpy(bias, gelu):
    model, params = init(bias=bias, gelu=gelu)
    params = randomised(params)
    expected = numpy_logits(
        jax.tree.map(lambda a: np.asarray(a, np.float64), params), ONE_ROW[0], gelu
    )
    logits = model.apply({"params": params}, ONE_ROW)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_logit_has_a_gradient_from_every_past_position_and_no_future_one(
    tiny_model,
):
    model, params = tiny_model

    def logit(positions, t):  # positions' embeddings stand for their inputs
        changed = params | {"wpe": {"embedding": positions}}
        return model.apply({"params": changed}, ONE_ROW)[0, t].sum()

    for t in range(T):
        grads_TC = jax.grad(logit)(params["wpe"]["embedding"], t)
        reached = np.abs(grads_TC).max(axis=1) > 0
        assert reached.tolist() == [s <= t for s in range(T)]


@pytest.mark.parametrize(
    ("preset", "excess"), [("shakespeare-char-cpu", 0.1), ("shakespeare-char", 0.3)]
)
def test_loss_at_init_is_near_that_of_uniform_odds(preset, excess):
    config = changed(PRESETS[preset](), model={"vocab_size": 65}).model
    model = build_model(config, "cpu")
    tokens = jax.random.randint(jax.random.key(0), (4, config.block_size + 1), 0, 65)
    params = model.init(jax.random.key(0), tokens[:, :-1])
    loss = cross_entropy(model.apply(params, tokens[:, :-1]), tokens[:, 1:]).mean()
    assert -0.05 < loss - math.log(65) < excess


def test_parameters_are_as_many_as_nanogpt_says():
    config = changed(PRESETS["shakespeare-char"](), model={"vocab_size": 65}).model
    shapes = jax.eval_shape(build_model(config, "cpu").init, jax.random.key(0), ONE_ROW)
    sizes = {
        jax.tree_util.keystr(path): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    positions = next(size for name, size in sizes.items() if "wpe" in name)
    # Counted by hand: embedding, 6 blocks of 12 n_embd^2 and two norms, final norm.
    assert sum(sizes.values()) - positions == 65 * 384 + 6 * (12 * 384**2 + 768) + 384


def test_initial_scales_are_gpt2s():
    _, params = init(n_embd=256, n_layer=8, n_head=4, bias=True)
    block = params["h"]
    for kernel in (
        params["wte"]["embedding"],
        block["attn"]["c_attn"]["kernel"],
        block["mlp"]["c_fc"]["kernel"],
    ):
        assert kernel.std() == pytest.approx(0.02, rel=0.05)
    for kernel in (block["attn"]["c_proj"]["kernel"], block["mlp"]["c_proj"]["kernel"]):
        assert kernel.std() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
    assert not any(
        layer["bias"].any() for layer in (block["mlp"]["c_fc"], block["ln_1"])
    )
    assert not np.allclose(*block["mlp"]["c_fc"]["kernel"][:2])  # layers differ


def test_one_batch_can_be_overfit():
    model, params = init(n_embd=32)
    inputs, targets = ONE_ROW[:, :-1], ONE_ROW[:, 1:]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(carry, _):
        params, state = carry

        def loss_fn(params):
            return cross_entropy(
                model.apply({"params": params}, inputs), targets
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=100)
    assert losses[0] > 2
    assert losses[-1] < 0.01


def test_the_program_is_as_long_for_a_deep_model_as_for_a_shallow_one():
    def program_lines(n_layer):
        shape = {"n_layer": n_layer, "unroll": 2}
        model = build_model(changed(TINY, model=shape).model, "cpu")
        shapes = jax.eval_shape(model.init, jax.random.key(0), ONE_ROW)
        return len(jax.jit(model.apply).lower(shapes, ONE_ROW).as_text().splitlines())

    assert program_lines(4) == program_lines(24)


def test_rematerialisation_saves_memory_and_changes_no_gradient():
    def gradient(remat):
        shape = {"n_layer": 8, "n_embd": 32, "block_size": 64, "dropout": 0.3}
        model = build_model(changed(TINY, model=shape | {"remat": remat}).model, "cpu")
        tokens = jnp.zeros((4, 64), jnp.int32)

        def loss(params):
            logits = model.apply(
                params, tokens, deterministic=False, rngs={"dropout": jax.random.key(2)}
            )
            return (logits**2).mean()

        params = model.init(jax.random.key(0), tokens)
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (kept, kept_bytes), (remade, remade_bytes) = gradient(False), gradient(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), kept, remade)
    assert remade_bytes < 0.5 * kept_bytes


def test_bfloat16_computes_near_float32_and_keeps_parameters_and_logits_float32():
    model, params = init(compute_dtype="bfloat16")
    exact, _ = init()
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = model.apply({"params": params}, ONE_ROW)
    assert logits.dtype == jnp.float32
    expected = exact.apply({"params": params}, ONE_ROW)
    assert not np.array_equal(logits, expected)
    np.testing.assert_allclose(logits, expected, atol=2e-2 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("n_head", "n_embd", "block_size", "vocab_size", "rows"),
    [(1, 8, 1, 11, 1), (3, 9, 7, 11, 3), (1, 1, 1, 2, 1), (5, 40, 130, 1, 2)],
)
def test_bfloat16_trains_and_generates_in_odd_shapes(
    n_head, n_embd, block_size, vocab_size, rows
):
    # XLA's CPU library knows bfloat16's products in some orders of their axes only.
    model, params = init(
        n_head=n_head,
        n_embd=n_embd,
        block_size=block_size,
        vocab_size=vocab_size,
        compute_dtype="bfloat16",
        bias=True,
    )
    tokens = np.zeros((rows, block_size), np.int32)
    context = Context(jax.random.key(0), np.arange(rows))
    loss = next_token(model)
    grads = jax.jit(jax.grad(lambda p: loss(p, (tokens, tokens), context)[0].total))(
        params
    )
    assert np.isfinite(optax.tree.norm(grads))
    prompts = [[0] * length for length in range(1, rows + 1)]
    pieces = generate_tokens(model, params, prompts, block_size + 2)
    drawn = [tokens for tokens, _ in pieces]
    assert np.concatenate(drawn, axis=1).shape == (rows, block_size + 2)


def test_attention_in_blocks_is_attention_at_once(tiny_model, monkeypatch):
    model, params = tiny_model

    def found(size):
        """Logits, maps and gradients with blocks of so many queries."""
        monkeypatch.setattr(blocks, "SMALLEST_BLOCK", size)

        def loss(params):
            variables = {"params": params}
            found = model.apply(variables, ONE_ROW, mutable="intermediates")
            return jnp.square(found[0]).mean(), found

        (_, logits_and_maps), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return logits_and_maps, grads

    assert T % 3  # so that the last block is shorter
    for in_blocks, at_once in zip(
        jax.tree.leaves(found(3)), jax.tree.leaves(found(T)), strict=True
    ):
        np.testing.assert_allclose(in_blocks, at_once, rtol=1e-4, atol=1e-6)


def test_each_layer_draws_its_own_dropout_mask():
    model, params = init(n_embd=64, vocab_size=64, dropout=0.5, bias=True)
    params = jax.tree.map(jnp.zeros_like, params)
    # Each block adds its mask to the stream, and the head shows the stream as it is.
    params["h"]["mlp"]["c_proj"]["bias"] += 1.0
    params["ln_f"]["scale"] += 1.0
    params["wte"]["embedding"] += 1e-3 * jnp.eye(64)
    stream_C = np.sort(dropped_logits(model, params, ONE_ROW, None)[0, 0])
    levels = 1 + (np.diff(stream_C) > 0.1 * np.ptp(stream_C)).sum()
    assert levels == 3  # kept by no layer, by one, by both; equal masks would give 2


def test_dropout_keeps_the_mean():
    model, params = init(dropout=0.3)
    tokens = jnp.tile(ONE_ROW[:, :1], (4000, 1))
    mean = dropped_logits(model, params, tokens, None).mean(axis=0)
    # A linear look would do for one layer; LayerNorm bends the mean a little.
    off = model.apply({"params": params}, ONE_ROW[:, :1])[0]
    assert np.corrcoef(mean.ravel(), off.ravel())[0, 1] > 0.98


@partial(jax.jit, static_argnums=0)
def read_on(model, params, tokens, last_B, start_B, caches):
    arguments = tokens, last_B, start_B, caches
    return model.apply(
        {"params": unstack_layers(params)}, *arguments, method="next_token_logits"
    )


@given(st.lists(st.integers(1, T), min_size=1, max_size=3), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_reading_in_pieces_gives_the_logits_of_one_reading(tiny_model, pieces, seed):
    model, params = tiny_model
    tokens = np.random.default_rng(seed).integers(V, size=(2, T))
    expected = model.apply({"params": params}, tokens)
    caches, read, start_B = model.init_cache(2), 0, None
    for size in pieces:
        piece = tokens[:, read : read + size]
        read += piece.shape[1]
        if piece.size:
            last_B = jnp.full(2, piece.shape[1] - 1)
            logits, caches = read_on(model, params, piece, last_B, start_B, caches)
            np.testing.assert_allclose(logits, expected[:, read - 1], atol=1e-4)
            start_B = jnp.full(2, read)
