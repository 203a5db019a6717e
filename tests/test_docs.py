"""The commands, sessions, tables and samples of README.md and docs/."""

import doctest
import hashlib
import io
import json
import re
import shlex
from unittest.mock import create_autospec

import jax
import PIL.Image
import pyarrow as pa
import pytest
import torch_gpt2
import torch_nanogpt
from conftest import ROOT
from jax.sharding import AbstractMesh
from pyarrow import parquet
from rich.console import Console
from torch_nanogpt import CHARACTERS

from jaxgpt import CharTokenizer
from jaxgpt.cli import parse_arguments
from jaxgpt.commands import lecture
from jaxgpt.models import lecture as models
from jaxgpt.models import parameter_shapes
from jaxgpt.parallel.mesh import AXES, with_shardings
from jaxgpt.presets import PRESETS, lecture_bigram
from jaxgpt.start import cache_dir
from jaxgpt.text import prepare as preparing
from jaxgpt.text import tinyshakespeare
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.pretrained import save_nanogpt_meta

DOCS = ROOT / "docs"
README, PRESETS_PAGE, SCALING, PYTORCH, LECTURE, DATA, CHAT, CHATGPT = (
    (DOCS / name).with_suffix(".md").read_text(encoding="utf-8")
    for name in (
        "../README",
        "presets",
        "scaling",
        "pytorch",
        "lecture",
        "data",
        "chat",
        "chatgpt",
    )
)
RESULTS = json.loads((DOCS / "lecture.json").read_text(encoding="utf-8"))
TRAIN = re.findall(
    r"python train\.py(?! --help)([^#`\n]*)",
    README + SCALING + LECTURE + DATA + CHAT + CHATGPT,
)

SHORTER = {
    "train.py": "--train.max-steps 2 --train.eval-interval 1 --train.eval-iters 1 "
    "--model.n-layer 1 --model.n-embd 48 --data.batch-size 8",
    "generate.py": "--max-new-tokens 20",
    "jaxgpt lecture": "--steps-scale 0.001",
    "jaxgpt compare": "--steps 2 --length 8 --greedy-tokens 9",
}


def commands(text, *programs):
    """The arguments of `python ...` in indented blocks, comments left out."""
    lines = re.findall(r"^    python (?:-m )?(.*)$", text, re.MULTILINE)
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[0] in programs]


@pytest.fixture
def short_shakespeare(tmp_path, monkeypatch):
    """The start of Tiny Shakespeare, with all its characters, in its place."""
    load_corpus(lecture_bigram())  # says so if it has to fetch
    cache, short_cache = cache_dir(), tmp_path / "cache"
    text = (cache / "tinyshakespeare.txt").read_text(encoding="utf-8")
    short = text[:30_000] + "".join(sorted(set(text)))
    short_cache.mkdir()
    (cache / "gpt2").mkdir(exist_ok=True)
    (short_cache / "gpt2").symlink_to(cache / "gpt2")
    (short_cache / "tinyshakespeare.txt").write_text(short, encoding="utf-8")
    monkeypatch.setenv("JAXGPT_CACHE", str(short_cache))
    digest = hashlib.sha256(short.encode()).hexdigest()
    monkeypatch.setattr(tinyshakespeare, "SHA256", digest)


@pytest.mark.processes
@pytest.mark.usefixtures("short_shakespeare")
@pytest.mark.slow
def test_every_command_of_the_lectures_page_works(
    call, untrained, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    kinds = {"sentiment": "classifier", "translate-de": "seq2seq", "chat-sft": "chat"}
    for preset, kind in kinds.items():
        (tmp_path / "runs" / preset).symlink_to(untrained / kind)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Lear\n")))
    monkeypatch.setattr(lecture, "RUNGS", lecture.RUNGS[:1])
    monkeypatch.setattr(lecture, "SCALED", lecture.RUNGS[0])
    torch_nanogpt.make(tmp_path / "ckpt.pt")
    save_nanogpt_meta(tmp_path / "meta.pkl", CharTokenizer(CHARACTERS))
    torch_gpt2.make(tmp_path / "gpt2")  # stands for the hub's
    (tmp_path / "data").mkdir()
    documents = pa.table({"text": ["To be, or not to be", "that is the question"]})
    parquet.write_table(documents, tmp_path / "data" / "a.parquet")
    commands_here = commands(LECTURE, "train.py", "generate.py", "jaxgpt")
    assert len(commands_here) > 10
    commands_there = dict.fromkeys(map(tuple, commands(README + PYTORCH, "jaxgpt")))
    for words in [*commands_here, *commands_there]:  # those on both pages once
        name = " ".join(words[: 1 + (words[0] == "jaxgpt")])
        shorter = SHORTER.get(name, "").split()
        status = int(name == "jaxgpt lecture")  # after so few steps no rung agrees
        assert any(call(*words, *shorter, status=status))
    assert (tmp_path / "runs/shakespeare-char-cpu/attention.png").exists()


@pytest.mark.parametrize("flags", sorted(set(TRAIN)))
def test_every_train_command_is_valid(tiny_run, untrained, flags):
    policy, reward = str(untrained / "gpt"), str(untrained / "reward")
    flags = re.sub(r"\bDIR\b|runs/(gpt2|reviews-bpe)\b", str(tiny_run), flags)
    flags = re.sub(r"\bRUN\b|runs/policy\b", policy, flags)
    flags = flags.replace("runs/assistant-sft", str(untrained / "chat"))
    parse_arguments(shlex.split(flags.replace("runs/reward", reward)))


def test_every_prepare_command_is_valid(call, monkeypatch):
    prepare = create_autospec(preparing.prepare)
    monkeypatch.setattr(preparing, "prepare", prepare)
    lines = [words for words in commands(DATA, "jaxgpt") if words[1] == "prepare"]
    for words in lines:
        call(*words)
    assert prepare.call_count == len(lines) > 4


def test_the_python_example_of_the_readme_runs(smoke, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example.replace("runs/shakespeare-char-cpu", str(smoke[0])), names)
    assert len(capsys.readouterr().out) == 201
    assert names["logits_BTV"].shape == (1, 19, 65)


def test_the_python_session_of_the_lectures_page_prints_what_it_shows():
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


def test_the_pages_show_each_rungs_own_sample_and_loss():
    samples = re.findall(r"```text\n(.*?)\n```", LECTURE, re.DOTALL)
    for sample, result in zip(samples, RESULTS["rungs"], strict=True):
        assert len(sample) > 100
        assert sample in result["sample"]
        loss, name = f"{result['val_loss']:.2f}", result["rung"]
        assert re.search(rf"`{name}` .*\| {loss} \|", PRESETS_PAGE)
        summary, *_ = PRESETS[name].__doc__.splitlines()
        assert f"val {loss}." in summary
        if name != "lecture-bigram":
            (section,) = (part for part in LECTURE.split("\n## ") if sample in part)
            assert loss in section


def test_every_preset_is_in_the_table_of_presets():
    assert re.findall(r"^\| `([\w.-]+)` \|", PRESETS_PAGE, re.M) == list(PRESETS)


def test_the_attention_maps_are_of_the_prompt_above_them():
    with PIL.Image.open(DOCS / "attention.png") as picture:
        prompt = picture.info["Description"]
    section = LECTURE.split("attention.png")[0].split("## ")[-1]
    assert f'--prompt "{prompt}"' in section


def test_the_functions_that_the_lectures_page_names_exist():
    named = set(re.findall(r"`(average_by_\w+|attention_\w+|[A-Z]\w+)`", LECTURE))
    assert len(named) > 10
    for name in named:
        assert hasattr(models, name), name


def test_the_table_of_shards_follows_from_the_sharding_rules():
    mesh = AbstractMesh((1, 64, 8), AXES)
    shapes = with_shardings(parameter_shapes(PRESETS["gpt3-175b"]().model), mesh)
    expected = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shard = leaf.sharding.shard_shape(leaf.shape)
        expected[name] = list(leaf.shape), list(shard)
    row = r"^\| `(\w+/[\w/]+)` \|.*\| (\[.*\]) \| (\[.*\]) \|"
    rows = re.findall(row, SCALING, re.MULTILINE)
    assert len(rows) == 10
    for name, whole, part in rows:
        assert (json.loads(whole), json.loads(part)) == expected[name], name
