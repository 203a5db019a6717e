import ast
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from conftest import ROOT, TINY, changed

from jaxgpt.parallel import defaults
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import make_mesh, single_device_mesh
from jaxgpt.planning.plan import tpu_devices


def gpu(kind, capability):
    """A GPU, as far as its platform is concerned."""
    return SimpleNamespace(
        platform="gpu", device_kind=kind, compute_capability=capability
    )


@pytest.mark.parametrize(
    ("device", "platform"),
    [
        (gpu("NVIDIA H100 80GB HBM3", "9.0"), "cuda"),
        (gpu("NVIDIA A100-SXM4-40GB", "8.0"), "cuda"),
        (gpu("NVIDIA B200", "10.0"), "cuda"),
        (gpu("Tesla T4", "7.5"), "gpu"),
        (gpu("NVIDIA Tesla V100", "7.0"), "gpu"),
        (gpu("AMD Instinct MI300X", "gfx942"), "gpu"),
        (SimpleNamespace(platform="tpu", device_kind="TPU v5 lite"), "tpu"),
    ],
)
def test_a_device_has_the_platform_whose_forms_it_can_run(device, platform):
    assert platform_of(device) == platform


def test_a_meshs_platform_is_that_of_its_devices():
    assert platform_of(single_device_mesh()) == "cpu" == platform_of(jax.devices()[0])
    tpus = make_mesh(changed(TINY, mesh={"data": 1}), devices=tpu_devices("v5e:1x1"))
    assert platform_of(tpus) == "tpu"


DECIDES = {"platform", "device_kind", "default_backend", "compute_capability"}
PLATFORMS = {"cpu", "tpu", "cuda", "gpu", "rocm"}
HOUSES = ("ops", "parallel")  # where a platform may decide


def decisions(source):
    """Lines of conditions that ask for a platform, or for the class of a model."""
    for node in ast.walk(ast.parse(source)):
        asked = [node] if isinstance(node, (ast.Compare, ast.Match)) else []
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            asked.append(node.test)
        for part in (part for each in asked for part in ast.walk(each)):
            if (
                (isinstance(part, ast.Attribute) and part.attr in DECIDES)
                or (isinstance(part, ast.Constant) and part.value in PLATFORMS)
                or (isinstance(part, ast.Name) and part.id == "NVIDIA")
            ):
                yield node.lineno
        if re.match(r"isinstance\((\w+\.)?model, (?!dict\))", ast.unparse(node)):
            yield node.lineno


def test_no_platform_and_no_class_of_a_model_decides_outside_its_house():
    files = [*(ROOT / "jaxgpt").rglob("*.py"), ROOT / "train.py", ROOT / "generate.py"]
    inside = {True: [], False: []}
    for path in files:
        house = path.relative_to(ROOT).parts[1:2] and path.relative_to(ROOT).parts[1]
        for line in decisions(path.read_text(encoding="utf-8")):
            inside[house in HOUSES].append(f"{path.relative_to(ROOT)}:{line}")
    assert inside[False] == []
    assert {
        Path(found).stem for found in map(lambda f: f.split(":")[0], inside[True])
    } == {*("attention", "cross_entropy", "defaults", "embedding", "gelu", "matmul")}


@pytest.mark.parametrize(
    ("asked", "platform", "pieces"),
    [(-1, "cpu", 16), (1, "cpu", 1), (2, "cpu", 2), (-1, "gpu", 1)],
)
def test_a_cpu_is_left_to_choose_pieces_that_fit_its_cache(
    monkeypatch, asked, platform, pieces
):
    config = changed(
        TINY,
        model={"block_size": 256},
        data={"batch_size": 128, "gradient_accumulation_steps": asked},
        mesh={"data": 2},  # 64 rows each, of which 4 make 1024 tokens
    )
    monkeypatch.setattr(defaults, "platform_of", lambda mesh: platform)
    mesh = make_mesh(config, lambda line: None)
    assert (
        defaults.with_microbatches(config, mesh).data.gradient_accumulation_steps
        == pieces
    )
