import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch_nanogpt
from conftest import (
    ONE_ROW,
    PLATFORMS,
    TINY,
    build,
    changed,
    dropped_logits,
    init_model,
    logits_of,
    random_params,
    train_on,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from jaxgpt.generation.decode import generate_tokens, unstack_layers
from jaxgpt.interop.state_dict import to_state_dict
from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.ops import cross_entropy
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.presets import PRESETS
from jaxgpt.training.objectives import Context, next_token
from jaxgpt.training.step import create_state

T, V = TINY.model.block_size, TINY.model.vocab_size


@pytest.mark.parametrize(
    ("platform", "bias"),
    [("cpu", True), *((platform, False) for platform in PLATFORMS)],
)
def test_loss_and_gradients_are_those_of_nanogpts_gpt_in_pytorch(platform, bias):
    model = build(bias=bias, dropout=0.0).clone(platform=platform)
    params = random_params(model, mean=0.1, std=0.2)
    names = [*torch_nanogpt.MODEL_ARGS, "bias"]
    reference = torch_nanogpt.GPT(**{n: getattr(model.config, n) for n in names})
    state = to_state_dict(params, model.config, out_in=True)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    reference.load_state_dict({name: torch.tensor(a) for name, a in state.items()})
    tokens_BT = np.random.default_rng(0).integers(V, size=(4, T + 1))
    inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
    logits = reference(torch.tensor(inputs_BT)).flatten(0, 1)
    expected = functional.cross_entropy(logits, torch.tensor(targets_BT).flatten())
    expected.backward()

    def mean_loss(params):
        return cross_entropy(logits_of(model, params, inputs_BT), targets_BT).mean()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(params)
    assert float(loss) == pytest.approx(expected.item(), abs=1e-6)
    grads = to_state_dict(grads, model.config, out_in=True)
    for name, parameter in reference.named_parameters():
        assert parameter.grad.abs().max() > 1e-5
        np.testing.assert_allclose(grads[name], parameter.grad, atol=2e-6, err_msg=name)


def test_each_logit_has_a_gradient_from_every_past_position_and_no_future_one(
    tiny_model,
):
    model, params = tiny_model

    def logit_sums(positions_TC):  # their embeddings stand for the inputs
        embedded = params | {"wpe": {"embedding": positions_TC}}
        return logits_of(model, embedded, ONE_ROW)[0].sum(axis=-1)

    grads_TSC = jax.jit(jax.jacrev(logit_sums))(params["wpe"]["embedding"])
    reached_TS = np.abs(grads_TSC).max(axis=-1) > 0
    np.testing.assert_array_equal(reached_TS, np.tril(np.ones((T, T), bool)))


@pytest.mark.parametrize(
    ("preset", "excess"),
    [
        ("shakespeare-char-cpu", 0.1),
        pytest.param("shakespeare-char", 0.3, marks=pytest.mark.slow),
    ],
)
def test_loss_at_init_is_near_that_of_uniform_probabilities(preset, excess):
    fields = {"vocab_size": 65, "unroll": 1}
    model = build_model(changed(PRESETS[preset](), model=fields).model, "cpu")
    shape = 4, model.config.block_size + 1
    tokens_BT = jax.random.randint(jax.random.key(0), shape, 0, 65)

    @jax.jit
    def initial_loss(key):
        params = model.init(key, tokens_BT[:, :-1])
        logits_BTV = model.apply(params, tokens_BT[:, :-1])
        return cross_entropy(logits_BTV, tokens_BT[:, 1:]).mean()

    assert -0.05 < initial_loss(jax.random.key(0)) - math.log(65) < excess


def test_initial_scales_are_gpt2s():
    _, params = init_model(n_embd=256, n_layer=8, n_head=4, bias=True)
    attn, mlp, table = params["h"]["attn"], params["h"]["mlp"], params["wte"]
    inner = table["embedding"], attn["c_attn"]["kernel"], mlp["c_fc"]["kernel"]
    outer = attn["c_proj"]["kernel"], mlp["c_proj"]["kernel"]
    scales = [0.02] * 3 + [0.02 / 16**0.5] * 2  # of 16 residual additions
    stds = [float(kernel.std()) for kernel in (*inner, *outer)]
    assert stds == pytest.approx(scales, rel=0.05)
    assert not mlp["c_fc"]["bias"].any() | params["h"]["ln_1"]["bias"].any()
    assert not np.allclose(*mlp["c_fc"]["kernel"][:2])  # layers differ


def test_one_batch_can_be_overfit():
    shape = {"n_embd": 32, "dropout": 0.0, "unroll": 1}
    config = changed(TINY, model=shape, train={"max_steps": 100})
    config = changed(config, data={"batch_size": 1}, optimizer={"learning_rate": 1e-2})
    model, mesh = build_model(config.model, "cpu"), single_device_mesh()
    batches = [np.tile(a, (100, 1, 1)) for a in (ONE_ROW[:, :-1], ONE_ROW[:, 1:])]
    state = create_state(model, config, mesh)
    _, metrics = train_on(model, config, mesh, state, tuple(batches))
    assert metrics["loss"][0] > 2
    assert metrics["loss"][-1] < 0.01


def test_the_program_is_as_long_for_a_deep_model_as_for_a_shallow_one():
    def program_lines(n_layer):
        model = build(n_layer=n_layer, unroll=2)
        lowered = logits_of.lower(model, parameter_shapes(model.config), ONE_ROW)
        return len(lowered.as_text().splitlines())

    assert program_lines(4) == program_lines(24)


@pytest.mark.slow
def test_rematerialisation_saves_memory_and_changes_no_gradient():
    tokens_BT = np.zeros((4, 64), np.int32)

    def gradient(remat):
        model = build(n_layer=8, n_embd=32, block_size=64, unroll=1, remat=remat)

        def loss(params):
            logits = dropped_logits(model, params, tokens_BT, None)
            return (logits**2).mean()

        params = random_params(model)
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (kept, kept_bytes), (remade, remade_bytes) = gradient(False), gradient(True)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), kept, remade)
    assert remade_bytes < 0.5 * kept_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "rows"),
    [
        (2, 3, 9, 7, 11, 3),
        (1, 1, 1, 1, 2, 1),
        (1, 1, 8, 1, 1, 1),
        (1, 5, 40, 130, 11, 2),
    ],
)
def test_bfloat16_trains_and_generates_near_float32_in_all_shapes(
    n_layer, n_head, n_embd, block_size, vocab_size, rows
):
    # XLA's CPU library multiplies bfloat16 in some orders of the axes only.
    fields = {"n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    fields |= {"n_layer": n_layer, "vocab_size": vocab_size, "bias": True}
    model, exact_model = build(compute_dtype="bfloat16", **fields), build(**fields)
    params, T = random_params(model), block_size

    shape = (2, rows, T)
    batch = tuple(np.random.default_rng(0).integers(vocab_size, size=shape))
    context = Context(jax.random.key(0), np.arange(rows))

    def gradient(model):
        loss = next_token(model)
        return jax.jit(jax.grad(lambda p: loss(p, batch, context)[0].total))(params)

    found, exact = gradient(model), gradient(exact_model)
    error = optax.tree.norm(optax.tree.sub(found, exact))
    assert 0 < error < 0.02 * optax.tree.norm(exact) or vocab_size == 1
    initial = jax.tree.leaves(parameter_shapes(model.config))
    assert {leaf.dtype for leaf in initial} == {jnp.dtype("float32")}
    assert logits_of(model, params, batch[0]).dtype == jnp.float32

    @jax.jit
    def exact_log_probs(text_BT):
        logits_BTV = logits_of(exact_model, params, text_BT[:, :-1])
        return -cross_entropy(logits_BTV, text_BT[:, 1:])[0]

    prompts = [[0] * length for length in range(1, rows + 1)]
    drawn = zip(*generate_tokens(model, params, prompts, T + 2), strict=True)
    for prompt, new, found in zip(prompts, *map(np.hstack, drawn), strict=True):
        text_BT = np.array([[*prompt, *new]])
        cached = exact_log_probs(text_BT[:, : T + 1])[len(prompt) - 1 :]
        np.testing.assert_allclose(found[: len(cached)], cached, atol=0.05)
        last = exact_log_probs(text_BT[:, -T - 1 :])[-1]  # beyond the window
        np.testing.assert_allclose(found[-1], last, atol=0.05)


def test_each_layer_draws_its_own_dropout_mask():
    model = build(n_embd=64, vocab_size=64, dropout=0.5, bias=True)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    # Each block adds its mask to the stream, and the head shows the stream as it is.
    params["h"]["mlp"]["c_proj"]["bias"] += 1.0
    params["ln_f"]["scale"] += 1.0
    params["wte"]["embedding"] += 1e-3 * jnp.eye(64)
    stream_C = np.sort(dropped_logits(model, params, ONE_ROW, None)[0, 0])
    levels = 1 + (np.diff(stream_C) > 0.1 * np.ptp(stream_C)).sum()
    assert levels == 3  # kept by no layer, by one, by both; equal masks would give 2


@partial(jax.jit, static_argnums=0)
def read_on(model, params, *inputs):
    variables = {"params": unstack_layers(params)}
    return model.apply(variables, *inputs, method="next_token_logits")


@given(st.lists(st.sampled_from([1, 3]), max_size=T), st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
@example([T], 0)
@example([2, 5], 0)
def test_reading_in_parts_gives_the_logits_of_one_reading(tiny_model, sizes, seed):
    model, params = tiny_model
    tokens_BT = np.random.default_rng(seed).integers(V, size=(2, T))
    expected_BTV = logits_of(model, params, tokens_BT)
    caches, read, start_B = model.init_cache(2), 0, None
    for size in sizes:
        if read + size > T:
            break
        last_B, part_BT = jnp.full(2, size - 1), tokens_BT[:, read : read + size]
        logits_BV, caches = read_on(model, params, part_BT, last_B, start_B, caches)
        read += size
        np.testing.assert_allclose(logits_BV, expected_BTV[:, read - 1], atol=1e-4)
        start_B = jnp.full(2, read)
