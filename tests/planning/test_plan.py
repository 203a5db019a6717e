import dataclasses
import re
from collections import Counter
from itertools import islice

import pytest
from conftest import (
    ROOT,
    TINY,
    changed,
    finish,
    needs_libtpu,
    start_script,
    tpu,
    traced_steps,
)

from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning import plan
from jaxgpt.planning.hlo import collectives
from jaxgpt.planning.plan import describe, no_compilation_cache, tpu_devices
from jaxgpt.presets import PRESETS

WITHOUT_COMPILING = 7  # rows before the first that needs a compiled program
PLANNED = changed(PRESETS["smoke"](), model={"n_layer": 1, "vocab_size": 65})
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def by_name(lines):
    """Values of a plan's rows by name."""
    return {line[:19].strip(): line[19:] for line in lines}


def rows_of(config, topology="", count=None):
    """The first `count` rows of the plan."""
    return by_name(islice(describe(config, topology), count))


def mebibytes(value):
    number, unit = value.split()[:2]
    return float(number.replace(",", "")) * {"MiB": 1, "GiB": 1024}[unit]


# The cost of the others depends on their responses.
PLANNABLE = [name for name, make in PRESETS.items() if not make().rewarded]


def test_every_preset_has_a_plan_without_its_corpus(fresh_cache):
    parameters = {}
    for name in PLANNABLE:
        rows = rows_of(PRESETS[name](), count=WITHOUT_COMPILING)
        parameters[name] = int(rows["parameters"].replace(",", ""))
        moments = 2 * mebibytes(rows["parameter memory"])
        state = mebibytes(rows["optimizer state"])
        assert state == pytest.approx(moments, rel=0.05, abs=0.2), name
    assert not fresh_cache.exists()
    # As OpenAI counts them; nanoGPT's recipe leaves out the biases.
    biases = 12 * (3 * 768 + 768 + 4 * 768 + 768 + 2 * 768) + 768
    assert parameters["finetune-shakespeare"] == 124_439_808
    assert parameters["gpt2-124m"] == 124_439_808 - biases


SLOW = [
    pytest.param(name, marks=pytest.mark.slow) for name in PLANNABLE if name != "smoke"
]


@pytest.mark.parametrize("preset", ["smoke", *SLOW])
def test_a_plan_counts_the_temporary_memory_of_the_compiled_step(preset):
    config = PRESETS[preset]()
    if config.model.vocab_size:  # compiling the full model would take a minute
        small = {"n_layer": 2, "n_head": 8, "n_embd": 64, "block_size": 64}
        config = changed(config, model=small)
    memory = mebibytes(rows_of(config)["temporary memory"])
    assert memory > 0 or preset == "lecture-bigram"  # which is rounded to 0.0 MiB


@needs_libtpu
def test_a_plan_for_a_tpu_describes_its_chips(call):
    # A bigram model is a table lookup, without matmuls; one chip needs no collectives.
    out, _ = call("train.py", "lecture-bigram", "--plan", "v5e:1x1")
    rows = by_name(out.splitlines())
    assert rows["devices"] == "1 x TPU v5 lite (data 1 x fsdp 1 x tensor 1)"
    assert "of 16.0 GiB" in rows["total memory"]
    assert rows["compute time"] == rows["ICI time"] == "0 s"
    assert "roofline step time" not in rows


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e", "v99:2x2", "v5e:3x5", "cpu"])
def test_an_unknown_topology_is_an_error_that_names_it(call, topology):
    with pytest.raises(ValueError, match=repr(topology)):
        call("train.py", "lecture-bigram", "--plan", topology)


def test_a_plan_without_libtpu_names_the_requirements_to_install(monkeypatch):
    monkeypatch.setattr(plan, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"requirements-plan.txt"):
        tpu_devices("v5e:2x4")


@tpu
def test_a_plan_has_memory_collectives_and_a_lower_bound_of_the_step_time():
    config = changed(PLANNED, mesh={"data": 2, "fsdp": 2})
    rows = rows_of(config, "v5e:2x2")
    assert rows["devices"] == "4 x TPU v5 lite (data 2 x fsdp 2 x tensor 1)"
    whole = rows_of(PLANNED, "v5e:2x2", WITHOUT_COMPILING)["optimizer state"]
    half = mebibytes(rows["optimizer state"])
    assert half == pytest.approx(mebibytes(whole) / 2, abs=0.1)
    assert re.search(r"of 16.0 GiB per device", rows["total memory"])
    assert re.match(r"\d+ per step, \S+ MiB", rows["all-reduce"])
    step = float(rows["roofline step time"].split()[0])
    parts = [float(rows[f"{part} time"].split()[0]) for part in ("compute", "ICI")]
    assert step == max(parts)


@tpu
@pytest.mark.parametrize(
    ("preset", "model", "sides"),
    [
        ("sentiment", {"labels": ("a", "b")}, 1),
        ("reviews-mlm", {}, 1),
        ("reverse", {}, 2),
    ],
)
def test_a_plan_of_an_encoder_counts_texts_as_padded(preset, model, sides):
    small = {"n_layer": 1, "block_size": 24, "vocab_size": 100} | model
    config = changed(PRESETS[preset](), model=small, data={"batch_size": 16})
    rows = rows_of(config, "v5e:2x4")
    assert rows["tokens per step"] == f"at most {sides * 16 * 24:,}"
    assert rows["devices"].startswith("8 x")
    assert "roofline step time" in rows


@tpu
def test_a_step_that_does_not_fit_is_an_error_with_both_sizes(monkeypatch):
    huge = {"block_size": 8192, "n_head": 64}  # the compiler finds it too large
    with pytest.raises(ValueError, match=r"v5e:1x1: \S+G .* 15\S+G .*--mesh\.fsdp"):
        rows_of(changed(PLANNED, model=huge), "v5e:1x1")
    chip = dataclasses.replace(plan.CHIPS["TPU v5 lite"], hbm=2**18)
    monkeypatch.setitem(plan.CHIPS, "TPU v5 lite", chip)
    with pytest.raises(ValueError, match=r"v5e:1x1: \S+ MiB .* 0\.2 MiB"):
        rows_of(PLANNED, "v5e:1x1")


@tpu
def test_a_v4_chip_is_one_device_and_has_no_roofline_without_its_figures(monkeypatch):
    rows = rows_of(PLANNED, "v4:2x2x1")
    assert rows["devices"] == "4 x TPU v4 (data 4 x fsdp 1 x tensor 1)"
    assert "of 32.0 GiB" in rows["total memory"]
    monkeypatch.setattr(plan, "CHIPS", {})
    figures = {"compute time", "ICI time", "roofline step time"}
    assert rows.keys() - rows_of(PLANNED, "v4:2x2x1").keys() == figures


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "topology"), [("gpt2-124m", "v5e:2x4"), ("gpt3-175b", "v5p:8x8x8")]
)
def test_the_plans_in_docs_scaling_fit_and_have_its_figures(preset, topology):
    command = ("train.py", preset, "--plan", topology)
    out, _ = finish(start_script(*command), timeout=3600)
    rows = by_name(out.splitlines())
    told = SCALING.split(f"| `{preset}` on `{topology}` |")[1].splitlines()[0]
    bound = re.match(r"(.* s): at most (.* tokens/s)", rows["roofline step time"])
    temporary = rows["temporary memory"].removesuffix(" per device")
    for figure in (temporary, rows["FLOPs per step"], *bound.groups()):
        assert f" {figure} |" in told


SHAPE = {"n_layer": 3, "n_head": 8, "n_embd": 512, "block_size": 256}
SHAPE |= {"vocab_size": 1000, "compute_dtype": "bfloat16", "dropout": 0.0, "unroll": 1}
TEXTBOOK = changed(TINY, model=SHAPE, data={"batch_size": 64})
LAYER_MATRICES = 12 * 512**2 * 2  # bytes in bfloat16
ACTIVATIONS = 64 * 256 * 512 * 2  # of all rows
# Otherwise the compiler splits some collectives to overlap them with matmuls.
WHOLE_COLLECTIVES = {
    "xla_tpu_enable_async_collective_fusion": "false",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}


def collectives_of(**mesh):
    """Collectives of a step on 8 TPU chips, inside a layer and outside of the layers.

    Returns the number of tensors and their bytes for each of the two, by kind.
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
        if each.tensor_bytes > 2**16:  # omits norms, scalars and token ids
            counts[each.kind] += each.tensors
            sizes[each.kind] += each.tensor_bytes
    return *within, *outside


@needs_libtpu
@pytest.mark.slow
def test_fsdp_gathers_each_matrix_twice_and_reduces_its_gradient_once():
    counts, sizes, outer_counts, outer_sizes = collectives_of(fsdp=8)
    assert counts["all-gather"] == 2 * 4
    assert sizes["all-gather"] == 2 * LAYER_MATRICES
    # The compiler all-reduces one of the four, and drops other devices' shards.
    assert counts == {"all-gather": 8, "reduce-scatter": 3, "all-reduce": 1}
    assert sizes["reduce-scatter"] + sizes["all-reduce"] == LAYER_MATRICES
    tokens, positions = 1000 * 512 * 2, 256 * 512 * 2
    assert outer_sizes["all-gather"] == tokens + positions
    # The token embedding has a gradient as input, and one, in float32, as the head.
    assert outer_sizes["reduce-scatter"] == tokens + 2 * tokens
    assert outer_sizes["all-reduce"] == positions
    assert outer_counts == {"all-gather": 2, "reduce-scatter": 2, "all-reduce": 1}


@needs_libtpu
@pytest.mark.slow
def test_tensor_transfers_activations_as_megatron_with_sequence_parallelism():
    # Korthikanti et al. 2022, section 4.2.2: in each layer two gathers and two
    # reductions forward, as many backward, and two gathers of what was not saved.
    counts, sizes, outer_counts, outer_sizes = collectives_of(tensor=8)
    assert counts == {"all-gather": 6, "reduce-scatter": 4}
    assert sizes["all-gather"] == 6 * ACTIVATIONS
    assert sizes["reduce-scatter"] == 4 * ACTIVATIONS
    tokens = 1000 * 512 * 2
    assert outer_counts == {"all-gather": 1, "reduce-scatter": 2}
    assert outer_sizes["all-gather"] == tokens
    assert outer_sizes["reduce-scatter"] == tokens + 2 * tokens
