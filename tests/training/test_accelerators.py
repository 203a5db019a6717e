"""What GPUs and TPUs are told to do, read from programs for them: none need be here."""

import inspect
import math
import re
from importlib.util import find_spec
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed
from jax.sharding import AbstractDevice, AbstractMesh

from jaxgpt import runtime
from jaxgpt.models import build_model
from jaxgpt.training import objective
from jaxgpt.training.plan import not_cached, tpu_devices
from jaxgpt.training.sharding import activations_over, make_mesh, one_device
from jaxgpt.training.step import abstract_state, compile_eval_step, trace_train_steps

B, T, V = 2, 512, 50257
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": T, "vocab_size": V}
SMALL |= {"dropout": 0.0, "compute_dtype": "bfloat16", "unroll": 1}
LETTERS = {"block_size": 64, "vocab_size": 65}  # compiles in a second
NVIDIA = "NVIDIA H100 80GB HBM3"
DATA = {"batch_size": B, "gradient_accumulation_steps": 1}
needs_libtpu = pytest.mark.skipif(
    not find_spec("libtpu"), reason="libtpu is for Linux on x86-64"
)


@pytest.fixture(autouse=True, scope="module")
def users_optimizations():
    """Compilers do here what they do for users, though other tests have no time."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def settled(**model):
    """A config, and its model."""
    config = changed(TINY, model=SMALL | model, data=DATA)
    return config, build_model(config.model)


def state_of(**model):
    """Shapes of the leaves of the state that training donates."""
    config, built = settled(**model)
    return jax.tree.leaves(abstract_state(built, config, one_device()))


def for_tpu(**model):
    """The train step, compiled for a TPU chip."""
    config, built = settled(**model)
    mesh = make_mesh(config, devices=tpu_devices("v5e:1x1"))
    with not_cached():
        return trace_train_steps(built, config, mesh, 1).lower().compile()


def for_cuda(**model):
    """The train step's StableHLO for NVIDIA GPUs."""
    config, built = settled(**{"fused_attention": False} | model)  # needs cuDNN
    with patch.object(runtime, "device_kind", return_value=NVIDIA):
        traced = trace_train_steps(built, config, one_device(), 1)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(scope="module")
def tpu_program():
    """That of the large vocabulary, which takes 10 s to compile."""
    return for_tpu(remat=True)


def products_on_tpu(program):
    """Dtypes of both operands of each matrix product, and what it is for.

    Most are convolutions there.
    """
    for computation in program.as_text().split("\n\n"):
        dtypes = dict(re.findall(r"%(\S+) = (\w+)\[", computation))
        found = re.findall(r" (?:convolution|dot)\((.*?)\)(.*)", computation)
        for operands, attributes in found:
            name = re.search('op_name="(.*?)"', attributes)
            a, b = re.findall(r"%([^\s,]+)", operands)
            yield dtypes[a], dtypes[b], name and name[1]


def products_on_cuda(text):
    """Dtypes of both operands of each matrix product."""
    shape = r"tensor<(?:\d+x)*(\w+)>"
    return re.findall(rf"stablehlo\.dot_general.*: \({shape}, {shape}\)", text)


def calls_to_the_host(program):
    """What waits for the host, or is waited for by it, in a TPU program."""
    opcodes = r" (infeed|outfeed|send|recv)\("
    targets = r'custom_call_target="([^"]*(?:[Cc]allback|[Hh]ost)[^"]*)"'
    return re.findall(f"{opcodes}|{targets}", program.as_text())


def largest_tensor(text):
    """Elements of the largest one of a StableHLO program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@needs_libtpu
def test_the_tpu_compiler_multiplies_bfloat16_only(tpu_program):
    for program in (tpu_program, for_tpu(**LETTERS)):
        products = list(products_on_tpu(program))
        assert len(products) > 20
        assert [each for each in products if each[:2] != ("bf16", "bf16")] == []
    # It rounds some operands of float32 products itself: what it is asked for is what
    # CUDA's compiler is, below.
    asked_for_float32 = products_on_tpu(for_tpu(**LETTERS, compute_dtype="float32"))
    assert ("f32", "f32") in {each[:2] for each in asked_for_float32}


@needs_libtpu
def test_the_tpu_never_calls_the_host(tpu_program, monkeypatch):
    assert calls_to_the_host(tpu_program) == []

    def printing(logits_BTV, targets_BT, losses=objective.token_losses):
        jax.debug.print("{}", logits_BTV.sum())
        return losses(logits_BTV, targets_BT)

    monkeypatch.setattr(objective, "token_losses", printing)
    assert calls_to_the_host(for_tpu(**LETTERS)) != []


@needs_libtpu
def test_the_tpu_writes_the_new_state_over_the_old(tpu_program):
    header, leaves = tpu_program.as_text().partition("\n")[0], state_of()
    aliases = re.findall(r"{(\d+)}: \((\d+), {}, (?:may|must)-alias\)", header)
    assert aliases == [(str(i), str(i)) for i in range(len(leaves))]
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert tpu_program.memory_analysis().alias_size_in_bytes >= state_bytes


@needs_libtpu
def test_the_tpu_has_no_room_for_all_logits(tpu_program, monkeypatch):
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", math.inf)
    chunked, whole = (
        program.memory_analysis().temp_size_in_bytes
        for program in (tpu_program, for_tpu(remat=True))
    )
    assert whole - chunked == pytest.approx(B * T * V * 4, rel=0.1)


@pytest.mark.parametrize("remat", [False, True])
def test_cuda_is_asked_for_bfloat16_products_only(remat):
    products = products_on_cuda(for_cuda(remat=remat))
    assert len(products) > 20
    assert set(products) == {("bf16", "bf16")}
    products = products_on_cuda(for_cuda(remat=remat, compute_dtype="float32"))
    assert set(products) == {("f32", "f32")}


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_cuda_is_asked_to_add_in_float32_where_tokens_meet(compute_dtype):
    text = for_cuda(compute_dtype=compute_dtype)
    sums = re.findall(r'"stablehlo.scatter".*?-> tensor<\S+x(\w+)>', text, re.S)
    assert set(sums) == {"f32"}


def test_cuda_is_given_a_vocabulary_that_it_multiplies_fast():
    text = for_cuda()
    products = re.findall(r"stablehlo\.dot_general.*", text)
    heads = [line for line in products if "x50304x" in line]
    assert len(heads) == 3  # for the logits, and for both gradients
    assert not [line for line in products if f"x{V}x" in line]


def test_cuda_is_given_the_state_to_write_over_and_calls_nothing():
    text = for_cuda()  # with a callback to the host, this would raise already
    assert "custom_call" not in text
    (arguments,) = re.findall(r"func public @main\((.*)\) ->", text)
    donated = r"%arg(\d+): [^%]*(?:tf.aliasing_output|jax.buffer_donor)"
    indices = [int(index) for index in re.findall(donated, arguments)]
    assert indices == list(range(len(state_of())))


def test_no_step_asks_for_all_logits_of_a_large_vocabulary(monkeypatch):
    config, model = settled()
    params = abstract_state(model, config, one_device()).params
    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def largest():
        """Of the train step, and of the eval step."""
        eval_step = compile_eval_step(model, one_device())
        jitted = inspect.getclosurevars(eval_step).nonlocals["jitted"]
        with activations_over(one_device()):
            lowered = jitted.trace(params, (tokens_BT, tokens_BT)).lower()
        return largest_tensor(for_cuda()), largest_tensor(lowered.as_text())

    assert max(largest()) <= B * objective.LOGITS_AT_ONCE < B * T * V
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", math.inf)
    assert largest() == (B * T * 50304, B * T * V)


@pytest.fixture
def asked(monkeypatch):
    """What `jax.nn.dot_product_attention` is asked; it answers without cuDNN."""
    options, attention = [], jax.nn.dot_product_attention

    def record(*qkv, **asked):
        options.append(asked)
        return attention(*qkv, **asked | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return options


TOKENS_BT = np.arange(B * 128).reshape(B, 128) % 65


def apply_for(kind, variables, model, **options):
    """Applies a model as where it is traced for devices of the kind."""
    device = AbstractDevice(device_kind=kind, platform="", num_cores=None)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return model.apply(variables, TOKENS_BT, **options)


CUDNNS = [{"is_causal": True, "implementation": "cudnn"}]
TRAINING = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}


@pytest.mark.parametrize(
    ("kind", "config", "options", "expected"),
    [
        (NVIDIA, {}, {}, CUDNNS),
        (NVIDIA, {}, TRAINING, CUDNNS),
        (NVIDIA, {"dropout": 0.1}, {}, CUDNNS),
        (NVIDIA, {"dropout": 0.1}, TRAINING, []),
        (NVIDIA, {}, {"mutable": ["intermediates"]}, []),
        (NVIDIA, {"compute_dtype": "float32"}, {}, []),
        (NVIDIA, {"n_embd": 2 * 136}, {}, []),
        (NVIDIA, {"n_embd": 2 * 12}, {}, []),
        (NVIDIA, {"fused_attention": False}, {}, []),
        ("TPU v5 lite", {}, {}, []),
        ("cpu", {}, {}, []),
    ],
)
def test_cudnns_attention_is_asked_for_where_it_can_do_it(
    asked, kind, config, options, expected
):
    _, model = settled(**LETTERS | {"block_size": 128, "n_layer": 1} | config)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    asked.clear()
    jax.eval_shape(
        lambda variables: apply_for(kind, variables, model, **options), variables
    )
    assert asked[:1] == expected


def test_fused_attention_differs_from_blocks_by_less_than_rounding(asked):
    small = LETTERS | {"block_size": 128}
    _, model = settled(**small)
    _, exact = settled(**small, compute_dtype="float32")
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS_BT)
    # GPT-2's small initialisation makes attention nearly an average.
    variables = jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, variables)
    fused_BTV, blocks_BTV, exact_BTV = (
        apply_for(kind, variables, each)
        for kind, each in [(NVIDIA, model), ("cpu", model), ("cpu", exact)]
    )
    assert asked
    rounding = jnp.linalg.norm(blocks_BTV - exact_BTV)
    assert jnp.linalg.norm(fused_BTV - blocks_BTV) < rounding
