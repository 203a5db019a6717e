"""What GPUs and TPUs are told to do, read from programs for them: none need be here."""

import inspect
import math
import re
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, traced_steps

from jaxgpt import run
from jaxgpt.config import SamplingConfig
from jaxgpt.generation import decode
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import activation_sharding, make_mesh, single_device_mesh
from jaxgpt.planning.plan import no_compilation_cache, tpu_devices
from jaxgpt.training.evaluation import compile_losses
from jaxgpt.training.step import abstract_state

cross_entropy = import_module("jaxgpt.ops.cross_entropy")  # a function has its name

B, T, V = 2, 512, 50257
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": T, "vocab_size": V}
SMALL |= {"dropout": 0.0, "compute_dtype": "bfloat16", "unroll": 1}
LETTERS = {"block_size": 64, "vocab_size": 65}  # compiles in a second
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


def settled(platform, **model):
    """A config, and its model for the platform."""
    config = changed(TINY, model=SMALL | model, data=DATA)
    return config, build_model(config.model, platform)


def state_of(**model):
    """Shapes of the leaves of the state that training donates."""
    config, built = settled("cpu", **model)
    return jax.tree.leaves(abstract_state(built, config, single_device_mesh()))


def for_tpu(**model):
    """The train step, compiled for a TPU chip."""
    config, _ = settled("tpu", **model)
    mesh = make_mesh(config, devices=tpu_devices("v5e:1x1"))
    built = build_model(config.model, platform_of(mesh))
    with no_compilation_cache():
        return traced_steps(built, config, mesh).lower().compile()


def for_cuda(**model):
    """The train step's StableHLO for NVIDIA GPUs."""
    config, built = settled("cuda", **{"fused_attention": False} | model)  # needs cuDNN
    traced = traced_steps(built, config, single_device_mesh())
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

    def printing(logits_BTV, targets_BT, losses=cross_entropy.cross_entropy):
        jax.debug.print("{}", logits_BTV.sum())
        return losses(logits_BTV, targets_BT)

    monkeypatch.setattr(cross_entropy, "cross_entropy", printing)
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
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", math.inf)
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
    config, model = settled("cpu")
    params = abstract_state(model, config, single_device_mesh()).params
    tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def largest():
        """Of the train step, and of the eval step."""
        eval_step = compile_losses(model, single_device_mesh())
        jitted = inspect.getclosurevars(eval_step).nonlocals["jitted"]
        with activation_sharding(single_device_mesh()):
            lowered = jitted.trace(params, (tokens_BT, tokens_BT)).lower()
        return largest_tensor(for_cuda()), largest_tensor(lowered.as_text())

    assert max(largest()) <= B * cross_entropy.CHUNK_LOGITS < B * T * V
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", math.inf)
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


CUDNNS = [{"is_causal": True, "key_value_seq_lengths": None, "implementation": "cudnn"}]
TRAINING = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}


@pytest.mark.parametrize(
    ("platform", "config", "options", "expected"),
    [
        ("cuda", {}, {}, CUDNNS),
        ("cuda", {}, TRAINING, CUDNNS),
        ("cuda", {"dropout": 0.1}, {}, CUDNNS),
        ("cuda", {"dropout": 0.1}, TRAINING, []),
        ("cuda", {}, {"mutable": ["intermediates"]}, CUDNNS),
        ("cuda", {"compute_dtype": "float32"}, {}, []),
        ("cuda", {"n_embd": 2 * 136}, {}, []),
        ("cuda", {"n_embd": 2 * 12}, {}, []),
        ("cuda", {"fused_attention": False}, {}, []),
        ("gpu", {}, {}, []),
        ("tpu", {}, {}, []),
        ("cpu", {}, {}, []),
    ],
)
def test_cudnns_attention_is_asked_for_where_it_can_do_it(
    asked, platform, config, options, expected
):
    fields = LETTERS | {"block_size": 128, "n_layer": 1} | config
    _, model = settled(platform, **fields)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    asked.clear()
    jax.eval_shape(lambda v: model.apply(v, TOKENS_BT, **options), variables)
    assert asked[:1] == expected


def test_fused_attention_differs_from_blocks_by_less_than_rounding(asked):
    small = LETTERS | {"block_size": 128}
    _, fused = settled("cuda", **small)
    _, blocks = settled("cpu", **small)
    _, exact = settled("cpu", **small, compute_dtype="float32")
    variables = jax.jit(blocks.init)(jax.random.key(0), TOKENS_BT)
    # GPT-2's small initialisation makes attention nearly an average.
    variables = jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, variables)
    fused_BTV, blocks_BTV, exact_BTV = (
        each.apply(variables, TOKENS_BT) for each in (fused, blocks, exact)
    )
    assert asked
    rounding = jnp.linalg.norm(blocks_BTV - exact_BTV)
    assert jnp.linalg.norm(fused_BTV - blocks_BTV) < rounding


@pytest.fixture
def cudnn(monkeypatch):
    """Has custom calls stand for cuDNN's two passes, which only its plugin lowers."""

    def call(name, *arrays):
        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays[:3]]
        if name == "cudnn_forward":
            shapes = shapes[0]
        return jax.ffi.ffi_call(name, shapes)(*arrays)

    @jax.custom_vjp
    def attention(q, k, v):
        return call("cudnn_forward", q, k, v)

    attention.defvjp(
        lambda *qkv: (attention(*qkv), qkv),
        lambda qkv, grad: tuple(call("cudnn_backward", *qkv, grad)),
    )
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *qkv, **options: attention(*qkv)
    )


def lowered(platform, traced):
    return traced.lower(lowering_platforms=(platform,)).as_text()


def programs(platform):
    """Every kind of program that a run asks for, lowered for the platform by name."""
    shape = {"block_size": 128, "vocab_size": 65, "n_layer": 3, "unroll": 12}
    config, model = settled(platform, **shape)
    mesh = single_device_mesh()
    params = abstract_state(model, config, mesh).params
    tokens_BT = jax.ShapeDtypeStruct((B, 128), jnp.int32)
    yield "training", lowered(platform, traced_steps(model, config, mesh))
    eval_step = compile_losses(model, mesh)
    jitted = inspect.getclosurevars(eval_step).nonlocals["jitted"]
    with activation_sharding(mesh):
        traced = jitted.trace(params, (tokens_BT, tokens_BT))
    yield "evaluation", lowered(platform, traced)
    traced = jax.jit(model.apply).trace({"params": params}, tokens_BT)
    yield "run.model.apply", lowered(platform, traced)
    layers = jax.eval_shape(decode.unstack_layers, params)
    length_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    key_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    for cached in (True, False):
        prompts = model, layers, tokens_BT, length_B, key_B, cached
        state = jax.eval_shape(
            lambda *args, cached=cached: decode.start(model, *args, cached),
            *prompts[1:5],
        )
        drawing = model, SamplingConfig(), (), layers, state, 16
        reads = "with a cache" if cached else "by windows"
        if cached:
            yield "prompts", lowered(platform, decode.start.trace(*prompts))
        yield f"generation {reads}", lowered(platform, decode.decode.trace(*drawing))


def bfloat16_products(text):
    """Dtypes that products of two bfloat16 arrays return, in order."""
    shape = r"tensor<(?:\d+x)*bf16>"
    return re.findall(
        rf"stablehlo\.dot_general.*: \({shape}, {shape}\) -> tensor<(?:\d+x)*(\w+)>",
        text,
    )


# Calls of cuDNN's attention in the text, forward and backward. The scanned layers share
# one function. Of the 3 that `read` runs one by one, the last computes one position;
# that is left to the plain form, as is a token that attends to the cache.
CALLS = {
    "training": (1, 1),
    "evaluation": (1, 0),
    "run.model.apply": (1, 0),
    "prompts": (2, 0),
    "generation with a cache": (0, 0),
    "generation by windows": (2, 0),
}


@pytest.mark.usefixtures("cudnn")
def test_every_program_for_cuda_has_cudas_forms():
    found = {}
    for name, text in programs("cuda"):
        found[name] = text.count("@cudnn_forward"), text.count("@cudnn_backward")
        # Four products a layer; like layers may share one function.
        assert bfloat16_products(text).count("bf16") >= 4, name
    assert found == CALLS


def test_every_program_for_a_tpu_has_the_tpus_forms():
    for name, text in programs("tpu"):
        assert bfloat16_products(text).count("bf16") >= 4, name
        assert "custom_call @" not in text.replace("custom_call @Sharding", "")
    scatters = re.findall(
        r'"stablehlo.scatter".*?-> tensor<\S+x(\w+)>',
        dict(programs("tpu"))["training"],
        re.S,
    )
    assert "bf16" in scatters  # of the embeddings' gradients


def test_every_program_for_a_cpu_has_the_cpus_forms():
    for name, text in programs("cpu"):
        assert set(bfloat16_products(text)) == {"f32"}, name


def test_a_run_is_loaded_for_the_devices_it_is_loaded_on(tiny_run, monkeypatch):
    assert run.load_run(tiny_run).model.platform == "cpu"
    h100 = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0"
    )
    monkeypatch.setattr(run, "platform_of", lambda mesh: platform_of(h100))
    assert run.load_run(tiny_run).model.platform == "cuda"
