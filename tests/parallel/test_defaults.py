import ast
import dataclasses
import re
from types import SimpleNamespace

import jax
import pytest
from conftest import ROOT, TINY, changed, mesh_of

from jaxgpt.parallel import defaults
from jaxgpt.parallel.defaults import (
    evaluations_per_call,
    platform_of,
    with_steps_per_call,
)
from jaxgpt.parallel.mesh import single_device_mesh
from jaxgpt.presets import PRESETS


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "expected"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "9.0", "cuda"),
        ("gpu", "NVIDIA A100-SXM4-40GB", "8.0", "cuda"),
        ("gpu", "NVIDIA B200", "10.0", "cuda"),
        ("gpu", "Tesla T4", "7.5", "gpu"),
        ("gpu", "NVIDIA Tesla V100", "7.0", "gpu"),
        ("gpu", "AMD Instinct MI300X", "gfx942", "gpu"),
        ("tpu", "TPU v5 lite", None, "tpu"),
    ],
)
def test_the_platform_of_a_device_names_the_ops_it_can_run(
    platform, kind, capability, expected
):
    device = SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )
    assert platform_of(device) == expected


def test_the_platform_of_a_mesh_is_that_of_its_devices():
    assert platform_of(single_device_mesh()) == "cpu" == platform_of(jax.devices()[0])


ATTRIBUTES = {"platform", "device_kind", "default_backend", "compute_capability"}
PLATFORMS = {"cpu", "tpu", "cuda", "gpu", "rocm"}


def branches_on_platform(source):
    """Lines whose condition reads a platform, or the class of a model."""
    for node in ast.walk(ast.parse(source)):
        conditions = [node] if isinstance(node, (ast.Compare, ast.Match)) else []
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            conditions.append(node.test)
        for part in (part for each in conditions for part in ast.walk(each)):
            if (
                (isinstance(part, ast.Attribute) and part.attr in ATTRIBUTES)
                or (isinstance(part, ast.Constant) and part.value in PLATFORMS)
                or (isinstance(part, ast.Name) and part.id == "NVIDIA")
            ):
                yield node.lineno
        if re.match(r"isinstance\((\w+\.)?model, (?!dict\))", ast.unparse(node)):
            yield node.lineno


def test_only_ops_and_parallel_branch_on_the_platform_or_the_class_of_a_model():
    allowed, elsewhere = set(), []
    for path in [*(ROOT / "jaxgpt").rglob("*.py"), *ROOT.glob("*.py")]:
        for line in branches_on_platform(path.read_text(encoding="utf-8")):
            if path.parent in (ROOT / "jaxgpt" / "ops", ROOT / "jaxgpt" / "parallel"):
                allowed.add(path.stem)
            else:
                elsewhere.append(f"{path}:{line}")
    assert elsewhere == []
    ops = {"attention", "cross_entropy", "embedding", "gelu", "matmul"}
    assert allowed == ops | {"defaults"}


@pytest.mark.parametrize(
    ("steps", "platform", "microbatches"),
    [(-1, "cpu", 16), (1, "cpu", 1), (2, "cpu", 2), (-1, "gpu", 1)],
)
def test_a_cpu_defaults_to_microbatches_that_fit_its_cache(
    monkeypatch, steps, platform, microbatches
):
    config = changed(
        TINY,
        model={"block_size": 256},
        data={"batch_size": 128, "gradient_accumulation_steps": steps},
        mesh={"data": 2},  # 64 rows each, of which 4 make 1024 tokens
    )
    monkeypatch.setattr(defaults, "platform_of", lambda mesh: platform)
    data = defaults.with_microbatches(config, mesh_of(config)).data
    assert data.gradient_accumulation_steps == microbatches


@pytest.mark.parametrize(("platform", "most"), [("cpu", 1), ("gpu", 50)])
def test_a_dispatch_of_an_evaluation_is_a_share_of_a_second(
    monkeypatch, platform, most
):
    config = PRESETS["shakespeare-char"]()
    model = dataclasses.replace(config.model, vocab_size=65)
    config = dataclasses.replace(config, model=model)
    monkeypatch.setattr(defaults, "platform_of", lambda mesh: platform)
    mesh = single_device_mesh()
    sizes = {n: evaluations_per_call(config, mesh, n) for n in (1, 7, 60, 200, 211)}
    assert sizes[1] == 1
    assert all(min(most, n) <= size <= 100 for n, size in sizes.items())
    assert all(n % size == 0 for n, size in sizes.items() if n < 211)  # a prime


@pytest.mark.parametrize(
    ("platform", "preset", "train", "steps"),
    [
        ("cpu", "shakespeare-char-cpu", {}, 10),
        ("gpu", "shakespeare-char-cpu", {}, 50),  # at most 100, and it divides 250
        ("cpu", "shakespeare-char", {}, 1),
        ("gpu", "shakespeare-char", {}, 50),
        ("gpu", "shakespeare-char", {"checkpoint_interval": 40}, 10),  # and 40
        ("gpu", "shakespeare-char", {"eval_interval": 48, "max_steps": 48}, 48),
        ("gpu", "shakespeare-char", {"max_steps": 3750 + 30}, 50),
        (
            "gpu",
            "lecture-scaled",
            {"eval_interval": 270, "checkpoint_interval": 270, "max_steps": 324},
            54,
        ),
        ("cpu", "lecture-layer-norm", {}, 100),
        # These intervals share few divisors: single updates fill the other.
        ("gpu", "shakespeare-char", {"eval_interval": 128}, 64),
        ("gpu", "shakespeare-char", {"checkpoint_interval": 333}, 50),
        ("cpu", "shakespeare-char-cpu", {"eval_interval": 64}, 2),  # enough work
        ("gpu", "shakespeare-char", {"steps_per_call": 7}, 7),
    ],
)
def test_steps_per_call_divide_the_intervals_and_fit_a_second(
    monkeypatch, platform, preset, train, steps
):
    config = changed(PRESETS[preset](), model={"vocab_size": 65}, train=train)
    monkeypatch.setattr(defaults, "platform_of", lambda mesh: platform)
    chosen = with_steps_per_call(config, single_device_mesh())
    assert chosen.train.steps_per_call == steps
    assert changed(chosen, train={"steps_per_call": -1}) == changed(
        config, train={"steps_per_call": -1}
    )
