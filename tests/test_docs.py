"""The pages in docs/ and the commands of README.md, as a reader would try them."""

import doctest
import hashlib
import io
import json
import re
import shlex

import jax
import PIL.Image
import pytest
import torch_gpt2
import torch_nanogpt
from conftest import ROOT
from jax.sharding import AbstractMesh
from rich.console import Console
from torch_nanogpt import CHARACTERS

from jaxgpt import CharTokenizer
from jaxgpt.commands import lecture
from jaxgpt.models import lecture as models
from jaxgpt.models import parameter_shapes
from jaxgpt.parallel.mesh import AXES, with_shardings
from jaxgpt.presets import PRESETS, lecture_bigram
from jaxgpt.start import cache_dir
from jaxgpt.text import tinyshakespeare
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.pretrained import save_nanogpt_meta

SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
LECTURE = (ROOT / "docs" / "lecture.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PRESETS_PAGE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
PYTORCH = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "lecture.json").read_text(encoding="utf-8"))

SHORTER = {
    "train.py": "--train.max-steps 2 --train.eval-interval 1 --train.eval-iters 1 "
    "--model.n-layer 1 --model.n-embd 48 --data.batch-size 8",
    "generate.py": "--max-new-tokens 20",
    "jaxgpt lecture": "--steps-scale 0.001",
    "jaxgpt compare": "--steps 2 --length 8 --greedy-tokens 9",
}


def commands(text, *programs):
    """The arguments of `python ...` in indented blocks, comments left out."""
    found = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^    python (?:-m )?(.*)$", text, re.MULTILINE)
    ]
    return [words for words in found if words[0] in programs]


@pytest.fixture
def short_shakespeare(tmp_path, monkeypatch):
    """The start of Tiny Shakespeare, with all its characters, in its place."""
    load_corpus(lecture_bigram())  # says so if it has to fetch
    cache = cache_dir()
    text = (cache / "tinyshakespeare.txt").read_text(encoding="utf-8")
    short = text[:30_000] + "".join(sorted(set(text)))
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (cache / "gpt2").mkdir(exist_ok=True)
    (tmp_path / "cache" / "gpt2").symlink_to(cache / "gpt2")
    (tmp_path / "cache" / "tinyshakespeare.txt").write_text(short, encoding="utf-8")
    digest = hashlib.sha256(short.encode()).hexdigest()
    monkeypatch.setattr(tinyshakespeare, "SHA256", digest)


@pytest.mark.usefixtures("short_shakespeare")
def test_every_command_of_the_lectures_page_works(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lecture, "RUNGS", lecture.RUNGS[:1])
    monkeypatch.setattr(lecture, "SCALED", lecture.RUNGS[0])
    torch_nanogpt.make(tmp_path / "ckpt.pt")
    save_nanogpt_meta(tmp_path / "meta.pkl", CharTokenizer(CHARACTERS))
    torch_gpt2.make(tmp_path / "gpt2")  # stands for the hub's
    on_the_page = commands(LECTURE, "train.py", "generate.py", "jaxgpt")
    assert len(on_the_page) > 10
    on_others = dict.fromkeys(map(tuple, commands(README + PYTORCH, "jaxgpt")))
    for words in [*on_the_page, *on_others]:  # those on both pages once
        name = " ".join(words[: 1 + (words[0] == "jaxgpt")])
        shorter = SHORTER.get(name, "").split()
        short_ladder_misses = int(name == "jaxgpt lecture")
        out, _ = call(*words, *shorter, status=short_ladder_misses)
        assert out
    assert (tmp_path / "runs/shakespeare-char-cpu/attention.png").exists()


def test_the_python_session_of_the_lectures_page_is_true():
    load_corpus(lecture_bigram())  # says so if it has to fetch
    session = "\n".join(re.findall(r"```python\n(.*?)```", LECTURE, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(session, {}, "lecture.md", None, 0)
    assert len(test.examples) > 20
    report = io.StringIO()
    doctest.DocTestRunner().run(test, out=report.write)
    assert report.getvalue() == ""


def test_the_lectures_page_shows_the_table_of_its_results():
    assert RESULTS["steps_scale"] == 1
    assert len(RESULTS["seeds"]) == 3
    printed = io.StringIO()
    Console(file=printed, width=100).print(lecture.table(RESULTS["rungs"]))
    lines = [line.strip() for line in printed.getvalue().splitlines() if line.strip()]
    assert "\n".join(lines) in LECTURE
    for rung, result in zip(lecture.RUNGS, RESULTS["rungs"], strict=True):
        assert result["rung"] == rung.preset
        assert result["lecture"] == rung.lecture
        assert tuple(result["pytorch"]) == rung.pytorch
        assert result["passed"]
        assert rung.agrees(result["val_loss"])


@pytest.mark.parametrize("result", RESULTS["rungs"], ids=lambda result: result["rung"])
def test_the_lectures_page_shows_each_rungs_own_sample_and_loss(result):
    title = {
        "lecture-bigram": "The bigram model",
        "lecture-single-head": "One head of self-attention",
        "lecture-multi-head": "Many heads",
        "lecture-feed-forward": "Feed-forward",
        "lecture-blocks": "Blocks",
        "lecture-residual": "Residual connections",
        "lecture-layer-norm": "LayerNorm",
    }[result["rung"]]
    (section,) = re.findall(rf"^## {title}\n(.*?)^## ", LECTURE, re.DOTALL | re.M)
    (sample,) = re.findall(r"```text\n(.*?)\n```", section, re.DOTALL)
    assert len(sample) > 100
    assert sample in result["sample"]
    if result["rung"] != "lecture-bigram":
        assert f"{result['val_loss']:.2f}" in section
    summary = (PRESETS[result["rung"]].__doc__ or "").splitlines()[0]
    assert f"val {result['val_loss']:.2f}." in summary
    row = rf"`{result['rung']}` .*\| {result['val_loss']:.2f} \|"
    assert re.search(row, PRESETS_PAGE)


def test_the_picture_of_attention_is_of_the_prompt_above_it():
    with PIL.Image.open(ROOT / "docs" / "attention.png") as picture:
        prompt = picture.info["Description"]
    section = LECTURE.split("attention.png")[0].split("## ")[-1]
    assert f'--prompt "{prompt}"' in section


def test_the_code_that_the_lectures_page_names_is_there():
    named = set(re.findall(r"`(average_by_\w+|attention_\w+|[A-Z]\w+)`", LECTURE))
    assert len(named) > 10
    for name in named:
        assert hasattr(models, name), name


def test_the_table_of_shapes_is_what_the_rules_give():
    mesh = AbstractMesh((1, 64, 8), AXES)
    shapes = with_shardings(parameter_shapes(PRESETS["gpt3-175b"]().model), mesh)
    expected = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            list(leaf.shape),
            list(leaf.sharding.shard_shape(leaf.shape)),
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    row = r"^\| `(\w+/[\w/]+)` \|.*\| (\[.*\]) \| (\[.*\]) \|"
    told = re.findall(row, SCALING, re.MULTILINE)
    assert len(told) == 10
    for name, whole, part in told:
        assert (json.loads(whole), json.loads(part)) == expected[name], name
