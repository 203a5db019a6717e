"""Programs for GPUs and TPUs, lowered or compiled without such a device."""

import inspect
import math
import re
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, tpu, traced_steps

from jaxgpt import run
from jaxgpt.config import SamplingConfig, Seq2SeqConfig
from jaxgpt.generation import decode
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import activation_sharding, make_mesh, single_device_mesh
from jaxgpt.planning.plan import no_compilation_cache, tpu_devices
from jaxgpt.training.evaluation import make_losses_step
from jaxgpt.training.step import abstract_state

cross_entropy = import_module("jaxgpt.ops.cross_entropy")  # a function has its name

B, T, V = 2, 512, 50257
SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": T, "vocab_size": V}
SMALL |= {"dropout": 0.0, "compute_dtype": "bfloat16", "unroll": 1}
LETTERS = {"block_size": 64, "vocab_size": 65}  # compiles in a second
DATA = {"batch_size": B, "gradient_accumulation_steps": 1}


def build(platform, **model):
    """A config, and its model for the platform."""
    config = changed(TINY, model=SMALL | model, data=DATA)
    return config, build_model(config.model, platform)


def state_leaves():
    """Shapes of the leaves of the state that training donates."""
    config, model = build("cpu")
    return jax.tree.leaves(abstract_state(model, config, single_device_mesh()))


def for_tpu(**model):
    """The train step, compiled for a TPU chip as a user's is."""
    config, _ = build("tpu", **model)
    mesh = make_mesh(config, devices=tpu_devices("v5e:1x1"))
    assert platform_of(mesh) == "tpu"
    traced = traced_steps(build_model(config.model, "tpu"), config, mesh)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        with no_compilation_cache():
            return traced.lower().compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


def lowered_step(platform, **model):
    """The train step's StableHLO for the platform.

    It has a call in place of our kernel, which jax 0.11 lowers only for a GPU that it
    sees. cuDNN's attention can only be lowered by its plugin.
    """

    def kernel(logits_BTV, targets_BT, vocab_size):
        losses_BT = jax.ShapeDtypeStruct(targets_BT.shape, jnp.float32)
        grad_BTV = jax.ShapeDtypeStruct(logits_BTV.shape, logits_BTV.dtype)
        call = jax.ffi.ffi_call("our_kernel", (losses_BT, grad_BTV))
        return call(logits_BTV, targets_BT)

    config, built = build(platform, **{"fused_attention": False} | model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_fused_losses_and_gradient", kernel)
        return lowered(platform, traced_steps(built, config, single_device_mesh()))


def lowered(platform, traced):
    return traced.lower(lowering_platforms=(platform,)).as_text()


def traced_evaluation(model, params, block_size):
    eval_step = make_losses_step(model, single_device_mesh())
    jitted = inspect.getclosurevars(eval_step).nonlocals["jitted"]
    tokens_NBT = jax.ShapeDtypeStruct((1, B, block_size), jnp.int32)
    parts_NBT = jax.ShapeDtypeStruct((1, B, block_size), jnp.int8)
    with activation_sharding(single_device_mesh()):
        return jitted.trace(params, (tokens_NBT, tokens_NBT, parts_NBT))


@pytest.fixture(scope="module")
def tpu_program():
    """The train step with a large vocabulary, which takes 10 s to compile."""
    return for_tpu(remat=True)


@pytest.fixture(scope="module")
def cuda_program():
    return lowered_step("cuda")


def products_on_tpu(program):
    """Dtypes of both operands of each matmul, most of which are convolutions there."""
    found = []
    for computation in program.as_text().split("\n\n"):
        dtypes = dict(re.findall(r"%(\S+) = (\w+)\[", computation))
        for operands in re.findall(r" (?:convolution|dot)\((.*?)\)", computation):
            a, b = re.findall(r"%([^\s,]+)", operands)
            found.append((dtypes[a], dtypes[b]))
    return found


def products_on_cuda(text):
    """Dtypes of both operands of each matmul."""
    shape = r"tensor<(?:\d+x)*(\w+)>"
    return re.findall(rf"stablehlo\.dot_general.*: \({shape}, {shape}\)", text)


def calls_to_the_host(program):
    """Operations of a TPU program that transfer data to or from the host."""
    opcodes = r" (infeed|outfeed|send|recv)\("
    targets = r'custom_call_target="([^"]*(?:[Cc]allback|[Hh]ost)[^"]*)"'
    return re.findall(f"{opcodes}|{targets}", program.as_text())


def largest_tensor(text):
    """Number of elements of the largest tensor in a StableHLO program."""
    shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", text)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@tpu
def test_the_tpu_multiplies_only_bfloat16(tpu_program):
    for program in (tpu_program, for_tpu(**LETTERS)):
        products = products_on_tpu(program)
        assert len(products) > 20
        assert set(products) == {("bf16", "bf16")}
    # For float32, the compiler still rounds some operands itself.
    float32 = for_tpu(**LETTERS, compute_dtype="float32")
    assert ("f32", "f32") in products_on_tpu(float32)


@tpu
def test_the_tpu_never_calls_the_host(tpu_program, monkeypatch):
    assert calls_to_the_host(tpu_program) == []

    def printing(logits_BTV, targets_BT, losses=cross_entropy.cross_entropy):
        jax.debug.print("{}", logits_BTV.sum())
        return losses(logits_BTV, targets_BT)

    monkeypatch.setattr(cross_entropy, "cross_entropy", printing)
    assert calls_to_the_host(for_tpu(**LETTERS)) != []


@tpu
def test_the_tpu_writes_the_new_state_over_the_old(tpu_program):
    header, leaves = tpu_program.as_text().partition("\n")[0], state_leaves()
    aliases = re.findall(r"{(\d+)}: \((\d+), {}, (?:may|must)-alias\)", header)
    assert aliases == [(str(i), str(i)) for i in range(len(leaves))]
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert tpu_program.memory_analysis().alias_size_in_bytes >= state_bytes


@tpu
def test_the_tpu_has_no_memory_for_all_logits(tpu_program, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", math.inf)
    chunked, whole = (
        program.memory_analysis().temp_size_in_bytes
        for program in (tpu_program, for_tpu(remat=True))
    )
    assert whole - chunked == pytest.approx(B * T * V * 4, rel=0.1)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cuda_multiplies_in_the_compute_dtype_and_scatters_in_float32(remat, dtype):
    text = lowered_step("cuda", remat=remat, compute_dtype=dtype)
    products = products_on_cuda(text)
    assert len(products) > 20
    expected = "bf16" if dtype == "bfloat16" else "f32"
    assert set(products) == {(expected, expected)}
    assert scatters(text) == {"f32"}


def scatters(text):
    """Dtypes in which gradients of embeddings are summed."""
    return set(re.findall(r'"stablehlo.scatter".*?-> tensor<\S+x(\w+)>', text, re.S))


def test_cuda_multiplies_by_a_padded_vocabulary(cuda_program):
    products = re.findall(r"stablehlo\.dot_general.*", cuda_program)
    heads = [line for line in products if "x50304x" in line]
    assert len(heads) == 3  # for the logits, and for both gradients
    assert not [line for line in products if f"x{V}x" in line]


def test_cuda_calls_only_our_kernel_and_gives_it_logits_in_the_compute_dtype(
    cuda_program,
):
    calls = re.findall(r"custom_call @(\S+)\(.*: \((.*?)\) ->", cuda_program)
    assert [name for name, _ in calls] == ["our_kernel"]
    assert calls[0][1].startswith(f"tensor<{B}x{T}x50304xbf16>")
    assert f"{B}x{T}x50304xf32" not in cuda_program


def test_cuda_does_not_join_queries_keys_and_values(cuda_program):
    heads, head_dim = SMALL["n_head"], SMALL["n_embd"] // SMALL["n_head"]
    assert f"tensor<{B}x{T}x{heads}x{head_dim}xbf16>" in cuda_program
    assert f"tensor<{B}x{T}x3x{heads}x{head_dim}xbf16>" not in cuda_program
    # cuBLAS adds to no copy of the residual stream: two branches in each pass.
    barriers = re.findall(r"optimization_barrier .*", cuda_program)
    assert len([line for line in barriers if f"<{B}x{T}x128xbf16>" in line]) == 2 * 2


def test_cuda_writes_the_new_state_over_the_old(cuda_program):
    (arguments,) = re.findall(r"func public @main\((.*)\) ->", cuda_program)
    donated = r"%arg(\d+): [^%]*(?:tf.aliasing_output|jax.buffer_donor)"
    indices = [int(index) for index in re.findall(donated, arguments)]
    assert indices == list(range(len(state_leaves())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "width"), [("cuda", 50304), ("tpu", V), ("cpu", V)]
)
def test_no_step_has_all_logits_of_a_large_vocabulary(platform, width, monkeypatch):
    config, model = build(platform, fused_attention=False)
    params = abstract_state(model, config, single_device_mesh()).params

    def largest():
        """The largest tensors of the train step, and of the evaluation."""
        evaluation = lowered(platform, traced_evaluation(model, params, T))
        return largest_tensor(lowered_step(platform)), largest_tensor(evaluation)

    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 2**22)
    larger = 4 if platform == "cuda" else 1
    assert max(largest()) <= B * 2**22 * larger < B * T * V
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", math.inf)
    assert largest() == (B * T * width, B * T * width)


@pytest.fixture
def attention_options(monkeypatch):
    """Options of the calls to JAX's attention, which here runs without cuDNN."""
    calls, attention = [], jax.nn.dot_product_attention

    def record(*qkv, **options):
        calls.append(options)
        return attention(*qkv, **options | {"implementation": "xla"})

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return calls


TOKENS_BT = np.arange(B * 128).reshape(B, 128) % 65
TRAINING = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}


@pytest.mark.parametrize(
    ("platform", "config", "options", "used"),
    [
        ("cuda", {}, {}, True),
        ("cuda", {}, TRAINING, True),
        ("cuda", {"dropout": 0.1}, {}, True),
        ("cuda", {"dropout": 0.1}, TRAINING, False),
        ("cuda", {}, {"mutable": ["intermediates"]}, True),
        ("cuda", {"compute_dtype": "float32"}, {}, False),
        ("cuda", {"n_embd": 2 * 136}, {}, False),
        ("cuda", {"n_embd": 2 * 12}, {}, False),
        ("cuda", {"fused_attention": False}, {}, False),
        *((platform, {}, {}, False) for platform in ("gpu", "tpu", "cpu")),
    ],
)
def test_cudnns_attention_is_used_where_it_is_supported(
    attention_options, platform, config, options, used
):
    _, model = build(platform, **LETTERS | {"block_size": 128, "n_layer": 1} | config)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT)
    attention_options.clear()
    jax.eval_shape(lambda v: model.apply(v, TOKENS_BT, **options), variables)
    causal = {"is_causal": True, "key_value_seq_lengths": None}
    expected = [causal | {"implementation": "cudnn"}] if used else []
    assert attention_options[:1] == expected


def test_cudnns_attention_gets_the_lengths_of_sources(attention_options):
    shape = SMALL | {"block_size": 128, "n_layer": 1, "vocab_size": 65}
    model = build_model(Seq2SeqConfig(**shape), "cuda")
    inputs = {"source_BS": TOKENS_BT[:, :96], "lengths_B": np.array([96, 5])}
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS_BT, **inputs)
    attention_options.clear()
    jax.eval_shape(lambda v: model.apply(v, TOKENS_BT, **inputs), variables)
    calls = [
        (options["is_causal"], options["key_value_seq_lengths"] is not None)
        for options in attention_options
    ]
    # The encoder, the decoder to its own text, and the decoder to the encoder.
    assert list(dict.fromkeys(calls)) == [(False, True), (True, False)]
    assert calls[-1] == (False, True)


def test_fused_attention_differs_from_blocked_by_less_than_rounding(attention_options):
    small = LETTERS | {"block_size": 128}
    _, fused = build("cuda", **small)
    _, blocked = build("cpu", **small)
    _, exact = build("cpu", **small, compute_dtype="float32")
    variables = jax.jit(blocked.init)(jax.random.key(0), TOKENS_BT)
    # GPT-2's small initialisation makes attention nearly an average.
    variables = jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, variables)
    # Each operation rounds its result to bfloat16, as it does on a GPU.
    options = {"compiler_options": {"xla_allow_excess_precision": False}}
    fused_BTV, blocked_BTV, exact_BTV = (
        jax.jit(each.apply, **options)(variables, TOKENS_BT)
        for each in (fused, blocked, exact)
    )
    assert attention_options
    rounding = jnp.linalg.norm(blocked_BTV - exact_BTV)
    assert jnp.linalg.norm(fused_BTV - blocked_BTV) < rounding


@pytest.fixture
def cudnn(monkeypatch):
    """Custom calls in place of cuDNN's two passes, which only its plugin can lower."""

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


def programs(platform):
    """Every kind of program that a run needs, lowered for the platform, by name."""
    shape = {"block_size": 128, "vocab_size": 65, "n_layer": 3, "unroll": 12}
    config, model = build(platform, **shape)
    mesh = single_device_mesh()
    params = abstract_state(model, config, mesh).params
    tokens_BT = jax.ShapeDtypeStruct((B, 128), jnp.int32)
    layers = jax.eval_shape(decode.unstack_layers, params)
    length_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    key_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    prompts = layers, tokens_BT, length_B, key_B

    def traced_generation(cached):
        start = partial(decode.prefill, model, cached=cached)
        state = jax.eval_shape(start, *prompts)
        return decode.decode.trace(model, SamplingConfig(), (), layers, state, 16)

    traced = {
        "training": traced_steps(model, config, mesh),
        "evaluation": traced_evaluation(model, params, 128),
        "run.model.apply": jax.jit(model.apply).trace({"params": params}, tokens_BT),
        "prompts": decode.prefill.trace(model, *prompts, True),
        "generation with a cache": traced_generation(True),
        "generation by windows": traced_generation(False),
    }
    return {name: lowered(platform, each) for name, each in traced.items()}


def bfloat16_products(text):
    """Dtypes that matmuls of two bfloat16 arrays return, in order."""
    shape = r"tensor<(?:\d+x)*"
    operands = rf"\({shape}bf16>, {shape}bf16>\)"
    return re.findall(rf"stablehlo\.dot_general.*: {operands} -> {shape}(\w+)>", text)


# Calls of cuDNN's attention in the text, forward and backward. The scanned layers share
# one function, but with jax 0.11 only if they are not unrolled. Of the 3 unrolled
# layers of generation, the last computes one position; that uses the plain form, as
# does a token that attends to the cache.
CALLS = {
    "training": (1, 1),
    "evaluation": (1, 0),
    "run.model.apply": (1, 0),
    "prompts": (2, 0),
    "generation with a cache": (0, 0),
    "generation by windows": (2, 0),
}
UNROLLED = {"training": (3, 3), "evaluation": (3, 0), "run.model.apply": (3, 0)}


@pytest.mark.usefixtures("cudnn")
def test_every_program_for_cuda_uses_the_ops_for_cuda():
    found = {}
    for name, text in programs("cuda").items():
        found[name] = text.count("@cudnn_forward"), text.count("@cudnn_backward")
        # Four matmuls a layer; equal layers may share one function.
        assert bfloat16_products(text).count("bf16") >= 4, name
    assert found == (CALLS if jax.__version_info__ < (0, 11) else CALLS | UNROLLED)


def test_every_program_for_a_tpu_uses_the_ops_for_tpus():
    texts = programs("tpu")
    for name, text in texts.items():
        assert bfloat16_products(text).count("bf16") >= 4, name
        assert "custom_call @" not in text.replace("custom_call @Sharding", "")
    assert "bf16" in scatters(texts["training"])


def test_every_program_for_a_cpu_uses_the_ops_for_cpus():
    for name, text in programs("cpu").items():
        assert set(bfloat16_products(text)) == {"f32"}, name


def test_a_run_is_loaded_for_the_platform_of_the_devices(tiny_run, monkeypatch):
    assert run.load_run(tiny_run).model.platform == "cpu"
    h100 = {"device_kind": "NVIDIA H100", "compute_capability": "9.0"}
    h100 = SimpleNamespace(platform="gpu", **h100)
    monkeypatch.setattr(run, "platform_of", lambda mesh: platform_of(h100))
    assert run.load_run(tiny_run).model.platform == "cuda"
