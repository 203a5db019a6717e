import dataclasses
import re
from collections import Counter
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY, changed, finish, start_script, traced_steps

from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning import plan
from jaxgpt.planning.hlo import collectives
from jaxgpt.planning.plan import describe, no_compilation_cache, tpu_devices
from jaxgpt.presets import PRESETS, lecture_bigram


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accounted_for_without_its_corpus(preset, fresh_cache):
    config = PRESETS[preset]()
    if config.model.vocab_size:  # compiling these needs no accelerator, but a minute
        small = {"n_layer": 2, "n_head": 8, "n_embd": 64, "block_size": 64}
        config = changed(config, model=small)
    report = "\n".join(describe(config))
    assert "parameters" in report
    assert "temporary memory" in report
    assert not fresh_cache.exists()


def test_gpt2_124m_has_its_124_million_parameters():
    config = PRESETS["gpt2-124m"]()
    model = build_model(config.model, "cpu")
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    # As OpenAI counts them, less the biases that nanoGPT's recipe leaves out.
    biases = 12 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) + 768
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808 - biases


needs_libtpu = pytest.mark.skipif(
    not find_spec("libtpu"), reason="libtpu is for Linux on x86-64"
)
PLANNED = changed(PRESETS["smoke"](), model={"n_layer": 1, "vocab_size": 65})


SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def plan_of(topology, **sections):
    """What the plan says: the value of each row."""
    rows = describe(changed(PLANNED, **sections), topology)
    return {line[:19].strip(): line[19:] for line in rows}


@needs_libtpu
def test_a_plan_tells_memory_collectives_and_the_least_time():
    rows = plan_of("v5e:2x2", mesh={"data": 2, "fsdp": 2})
    assert rows["devices"] == "4 x TPU v5 lite (data 2 x fsdp 2 x tensor 1)"
    whole = plan_of("v5e:2x2", mesh={"data": 4})
    half, all_of_it = (
        float(re.match(r"[\d.]+", each["optimizer state"])[0]) for each in (rows, whole)
    )
    assert half == pytest.approx(all_of_it / 2, abs=0.1)
    assert re.search(r"of 16.0 GiB per device: it fits$", rows["memory in all"])
    assert re.match(r"\d+ per step, of .*; each device rec", rows["all-reduce"])
    step = float(rows["roofline step time"].split()[0])
    parts = ("compute", "ICI")
    assert step == max(float(rows[f"{part} time"].split()[0]) for part in parts)


@needs_libtpu
def test_a_step_that_does_not_fit_is_an_error_that_tells_by_how_much():
    huge = {"block_size": 8192, "n_head": 64}
    message = r"does not fit v5e:1x1: \S+G needed per device, 15\S+G there; give more"
    with pytest.raises(ValueError, match=message):
        plan_of("v5e:1x1", model=huge)


@needs_libtpu
def test_what_the_compiler_takes_but_the_chip_has_no_room_for_does_not_fit(monkeypatch):
    chip = dataclasses.replace(plan.CHIPS["TPU v5 lite"], hbm=2**18)
    monkeypatch.setitem(plan.CHIPS, "TPU v5 lite", chip)
    with pytest.raises(ValueError, match=r"MiB needed per device, 0\.2 MiB there"):
        plan_of("v5e:1x1")


@needs_libtpu
def test_a_v4_chip_is_one_device_with_all_of_its_memory():
    rows = plan_of("v4:2x2x1")
    assert rows["devices"] == "4 x TPU v4 (data 4 x fsdp 1 x tensor 1)"
    assert "of 32.0 GiB" in rows["memory in all"]


@needs_libtpu
def test_a_chip_without_published_figures_has_no_roofline(monkeypatch):
    monkeypatch.setattr(plan, "CHIPS", {})
    rows = plan_of("v5e:1x1")
    assert "it fits" in rows["memory in all"]
    assert "roofline step time" not in rows


@needs_libtpu
def test_a_model_without_products_on_one_chip_has_no_least_time():
    rows = describe(changed(lecture_bigram(), model={"vocab_size": 65}), "v5e:1x1")
    assert list(rows)[-2:] == [f"{part:19}0 s" for part in ("compute time", "ICI time")]


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e", "v99:2x2", "v5e:3x5", "cpu"])
def test_a_topology_that_libtpu_does_not_know_is_an_error(topology):
    _, err = finish(start_script("train.py", "smoke", "--plan", topology), code=1)
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"{topology!r} is not a TPU topology that libtpu knows" in line


def test_a_plan_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-plan.txt"):
        tpu_devices("v5e:2x4")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "topology"),
    [("gpt2-124m", "v5e:2x4"), ("gpt3-175b", "v5p:8x8x8")],
)
def test_the_plans_of_the_page_on_scaling_fit(preset, topology):
    out, _ = finish(start_script("train.py", preset, "--plan", topology), timeout=900)
    assert "it fits" in out
    rows = {line[:19].strip(): line[19:] for line in out.splitlines()}
    told = SCALING.split(f"| `{preset}` on `{topology}` |")[1].splitlines()[0]
    least = re.match(r"(.* s): at most (.* tokens/s)", rows["roofline step time"])
    temporary = rows["temporary memory"].removesuffix(" per device")
    for figure in (temporary, rows["FLOPs per step"], *least.groups()):
        assert f" {figure} |" in told


TEXTBOOK = changed(
    TINY,
    model={
        "n_layer": 3,
        "n_head": 8,
        "n_embd": 512,
        "block_size": 256,
        "vocab_size": 1000,
        "dropout": 0.0,
        "compute_dtype": "bfloat16",
        "unroll": 1,
    },
    data={"batch_size": 64},
)
LAYER_MATRICES = 12 * 512**2 * 2  # bytes in bfloat16
ACTIVATIONS = 64 * 256 * 512 * 2  # of all rows
# Else the compiler cuts some collectives into pieces that overlap with products.
WHOLE_COLLECTIVES = {
    "xla_tpu_enable_async_collective_fusion": "false",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}


def collectives_of(**mesh):
    """Those of a step on 8 TPU chips, in a layer and outside of the layers.

    Each as counts of tensors and bytes of them, by kind.
    """
    config = changed(TEXTBOOK, mesh={"data": 1} | mesh)
    devices = tpu_devices("v5e:2x4")
    mesh = make_mesh(config, devices=devices)
    traced = traced_steps(build_model(config.model, platform_of(mesh)), config, mesh)
    with no_compilation_cache():
        compiled = traced.lower().compile(compiler_options=WHOLE_COLLECTIVES)
    within = Counter(), Counter()
    outside = Counter(), Counter()
    for each in collectives(compiled.as_text()):
        assert each.group == 8
        counts, sizes = within if each.times == 3 else outside
        if each.tensor_bytes > 2**16:  # but for norms, scalars and token ids
            counts[each.kind] += each.tensors
            sizes[each.kind] += each.tensor_bytes
    return *within, *outside


@needs_libtpu
@pytest.mark.slow
def test_fsdp_gathers_each_matrix_twice_and_reduces_its_gradient_once():
    counts, sizes, outer_counts, outer_sizes = collectives_of(fsdp=8)
    assert counts["all-gather"] == 2 * 4
    assert sizes["all-gather"] == 2 * LAYER_MATRICES
    # The compiler reduces one of the four in full, and drops what is others'.
    assert counts == {"all-gather": 8, "reduce-scatter": 3, "all-reduce": 1}
    assert sizes["reduce-scatter"] + sizes["all-reduce"] == LAYER_MATRICES
    tokens, positions = 1000 * 512 * 2, 256 * 512 * 2
    assert outer_sizes["all-gather"] == tokens + positions
    # The tokens' table has a gradient as input, and one, in float32, as the head.
    assert outer_sizes["reduce-scatter"] == tokens + 2 * tokens
    assert outer_sizes["all-reduce"] == positions
    assert outer_counts == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}


@needs_libtpu
@pytest.mark.slow
def test_tensor_moves_activations_as_megatron_with_sequence_parallelism():
    # Korthikanti et al. 2022, section 4.2.2: in each layer two gathers and two
    # reductions forward, as many backward, and two gathers of what was not kept.
    counts, sizes, outer_counts, outer_sizes = collectives_of(tensor=8)
    assert counts == {"all-gather": 6, "reduce-scatter": 4}
    assert sizes["all-gather"] == 6 * ACTIVATIONS
    assert sizes["reduce-scatter"] == 4 * ACTIVATIONS
    tokens = 1000 * 512 * 2
    assert outer_counts == {"all-gather": 1, "reduce-scatter": 2}
    assert outer_sizes["all-gather"] == tokens
    assert outer_sizes["reduce-scatter"] == tokens + 2 * tokens
