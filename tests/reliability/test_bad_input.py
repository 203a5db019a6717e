"""Bad input, as users give it: each ends in a line that says what to do.

docs/bad-input.md has every case and its message, and is what the tests compare with:
JAXGPT_WRITE_TABLE=1 pytest -n0 tests/reliability/test_bad_input.py writes it anew.
"""

import dataclasses
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, changed, save_params

from jaxgpt import CharTokenizer, load_run, start
from jaxgpt.interop.huggingface import write_huggingface
from jaxgpt.interop.nanogpt import write_nanogpt
from jaxgpt.run import fcntl, load_state, save_config
from jaxgpt.text.pretrained import save_nanogpt_meta
from jaxgpt.training.checkpoint import open_checkpoints

PAGE = ROOT / "docs" / "bad-input.md"
WRITE = os.environ.get("JAXGPT_WRITE_TABLE") == "1"
HEADING = """\
# Bad input, and what is said of it

`pytest tests/reliability/test_bad_input.py` gives every command of this page, and
compares what was said with it. It makes sure too that there is no traceback, nothing on
stdout (but for what a plan knows before it fails), and that all files are as they were.
A message is what follows `error: `, or, where the exit status is 2, the first sentence
in the box that the parser of the command line draws; three dots and N stand for what is
not the same on all machines. DIR is the folder where the commands are given, with

| name | what it is |
|---|---|
| `text.txt` | 840 characters, of which 11 are distinct |
| `tokens` | the same as nanoGPT's `train.bin`, `val.bin` and `meta.pkl` |
| `runs/tiny` | a GPT trained on `text.txt` for 8 steps, with a block_size of 8 |
| `runs/bigram` | the lecture's first model, with the same characters |
| `runs/imported` | a GPT without tokenizer and optimizer state, as `import` makes it |
| `ckpt.pt`, `gpt2` | `runs/tiny`, as nanoGPT and Hugging Face have it |

unless the first column says otherwise.
"""


@pytest.fixture(scope="module")
def shelf(tiny_run, bigram, tmp_path_factory):
    """The folder that the page describes, to be copied and not changed."""
    here = tmp_path_factory.mktemp("shelf")
    tiny = here / "runs" / "tiny"
    shutil.copytree(tiny_run, tiny, ignore=shutil.ignore_patterns("*.png"))
    setting(tiny / "config.json", "data", path=["text.txt"])()
    (here / "text.txt").write_text("To be, or not to be.\n" * 40)
    config, state, _ = load_state(tiny)
    tokenizer = load_run(tiny).tokenizer
    ids = tokenizer.encode((here / "text.txt").read_text()).astype(np.uint16)
    (here / "tokens").mkdir()
    ids[:756].tofile(here / "tokens" / "train.bin")
    ids[756:].tofile(here / "tokens" / "val.bin")
    save_nanogpt_meta(here / "tokens" / "meta.pkl", tokenizer)

    write_nanogpt(here / "ckpt.pt", config, state, None, "tiny")
    write_huggingface(here / "gpt2", config.model, state.params, tokenizer)
    foreign = changed(config, data={"path": (), "sha256": ""})
    lecture = dataclasses.replace(foreign, model=bigram[0].config)
    for name, its_config, params, its_tokenizer in (
        ("bigram", lecture, bigram[1], tokenizer),
        ("imported", foreign, state.params, None),
    ):
        with open_checkpoints(here / "runs" / name / "checkpoints") as checkpoints:
            save_params(checkpoints, 8, params)
        save_config(here / "runs" / name, its_config, its_tokenizer)
    for lock in here.rglob("lock"):
        lock.write_text("")
    return here


# What a case changes in the copy; paths are relative to it.


def write(name, content=b""):
    """Replaces a file, or makes one."""
    data = content if isinstance(content, bytes) else content.encode()

    def setup():
        remove(name)()
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)

    return setup


def remove(name):
    def setup():
        if Path(name).is_dir():
            shutil.rmtree(name)
        Path(name).unlink(missing_ok=True)

    return setup


def folder(name):
    """Puts a folder in the place of a file."""

    def setup():
        remove(name)()
        Path(name).mkdir(parents=True)

    return setup


def cut(name, size):
    """Leaves the first bytes of a file."""
    return lambda: os.truncate(name, size)


def setting(name, section, **fields):
    """Changes a section of a JSON file, or its top where the section is ""."""

    def setup():
        content = json.loads(Path(name).read_text())
        (content[section] if section else content).update(fields)
        Path(name).write_text(json.dumps(content))

    return setup


def damaged(run_dir):
    """Flips a bit in the parameters of the run's checkpoints."""

    def setup():
        for path in Path(run_dir, "checkpoints").rglob("params/**/d/*"):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    return setup


def locked():
    """Holds the run as a training does; returns what holds it."""
    lock = os.open("runs/tiny/lock", os.O_WRONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def both(one, other):
    def setup():
        one()
        other()

    return setup


def torch_file(content):
    return lambda: torch.save(content, "ckpt.pt")


class Malicious:
    """Pickles as a command, which makes a file."""

    def __reduce__(self):
        return os.system, ("touch HACKED",)


NEW = "--out-dir runs/new"
TRAIN, TOKENS = (
    f"train.py smoke --data.path {path}" for path in ("text.txt", "tokens")
)
RESUME = "train.py --out-dir runs/tiny --resume"
START = "train.py smoke --init-from runs/tiny --data.path text.txt"
GENERATE = "generate.py --run-dir runs/tiny"
JAXGPT = "-m jaxgpt"
EVALUATE = f"{JAXGPT} evaluate --run-dir runs/tiny"
ATTENTION = f"{JAXGPT} attention --run-dir runs/tiny"
COMPARE = f"{JAXGPT} compare"
IMPORT, EXPORT = f"{JAXGPT} import", f"{JAXGPT} export"
CKPT, GPT2 = f"{IMPORT} nanogpt ckpt.pt runs/new", f"{IMPORT} huggingface gpt2 runs/new"
PROCESSES = "train.py smoke --num-processes 2 --process-id"
TINY_CONFIG = "runs/tiny/config.json"

# By group: what is wrong, the command, and what makes it wrong if the command does not.
CASES = {
    "The command line of train.py": [
        ("a preset that there is not", "train.py shakespear"),
        ("a preset after the flags", "train.py --train.seed 7 smoke"),
        ("a flag that there is not", "train.py smoke --model.layers 3"),
        ("a word where a number belongs", "train.py smoke --model.n-layer four"),
        ("a fraction of a step", "train.py smoke --train.max-steps 1e3"),
        ("a choice that there is not", "train.py smoke --model.gelu fast"),
        ("a corpus that there is not", "train.py smoke --data.corpus bible"),
        ("a flag without its value", "train.py smoke --out-dir"),
        ("a value for a flag of yes or no", "train.py smoke --model.bias yes"),
        ("go on and start anew", "train.py smoke --resume --overwrite"),
        ("a checkpoint of no run", "train.py smoke --checkpoint latest"),
    ],
    "Values of the config": [
        ("heads that do not divide", "train.py smoke --model.n-head 5"),
        ("no layers", "train.py smoke --model.n-layer 0"),
        ("more layers than can be", "train.py smoke --model.n-layer 3000000000"),
        ("no context", "train.py smoke --model.block-size 0"),
        ("no vocabulary", "train.py smoke --model.vocab-size 0"),
        ("all is dropped", "train.py smoke --model.dropout 1"),
        ("no learning", "train.py smoke --optimizer.learning-rate 0"),
        ("infinite learning", "train.py smoke --optimizer.learning-rate inf"),
        ("a floor above the peak", "train.py smoke --optimizer.min-lr 1"),
        ("a moment that never fades", "train.py smoke --optimizer.beta2 1"),
        ("a negative norm", "train.py smoke --optimizer.grad-clip -1"),
        ("no steps", "train.py smoke --train.max-steps 0"),
        ("fewer than no skipped steps", "train.py smoke --train.max-skipped-steps -1"),
        ("a seed below zero", "train.py smoke --train.seed -1"),
        ("a seed of more than 32 bits", "train.py smoke --train.seed 4294967296"),
        ("no rows", "train.py smoke --data.batch-size 0"),
        (
            "a batch in uneven pieces",
            "train.py smoke --data.batch-size 12 --data.gradient-accumulation-steps 5",
        ),
        (
            "a field that the model has no use for",
            "train.py lecture-bigram --model.n-embd 32",
        ),
    ],
    "The run directory": [
        ("it has a run already", f"{TRAIN} --out-dir runs/tiny"),
        ("there is no run to go on with", "train.py --out-dir runs/none --resume"),
        ("it is a file", f"{TRAIN} --out-dir text.txt"),
        ("it is in a file", f"{TRAIN} --out-dir text.txt/run"),
        ("it has files of others", f"{TRAIN} --out-dir tokens"),
        ("it has files of others, to overwrite", f"{TRAIN} --out-dir gpt2 --overwrite"),
        ("another training goes on in it", RESUME, locked),
        ("its model, changed", f"{RESUME} --model.n-layer 3"),
        ("its tokenizer, changed", f"{RESUME} --data.tokenizer gpt2"),
        ("fewer steps than it has made", f"{RESUME} --train.max-steps 4"),
        ("its config.json is cut", RESUME, cut(TINY_CONFIG, 100)),
        ("its config.json is empty", GENERATE, cut(TINY_CONFIG, 0)),
        ("its config.json is not UTF-8", RESUME, write(TINY_CONFIG, b"\xff{}")),
        ("its config.json is a folder", RESUME, folder(TINY_CONFIG)),
        (
            "its config.json has an unknown field",
            RESUME,
            setting(TINY_CONFIG, "model", n_layers=2),
        ),
        (
            "its config.json has a word for a number",
            RESUME,
            setting(TINY_CONFIG, "model", n_layer="two"),
        ),
        (
            "its config.json has a value out of range",
            RESUME,
            setting(TINY_CONFIG, "train", max_steps=0),
        ),
    ],
    "Text and tokens": [
        ("a file that is not there", f"train.py smoke --data.path tex.txt {NEW}"),
        ("a directory without tokens", f"train.py smoke --data.path runs {NEW}"),
        ("a directory among files", f"{TRAIN} tokens {NEW}"),
        ("an empty file", f"{TRAIN} {NEW}", write("text.txt")),
        (
            "text that is not UTF-8",
            f"{TRAIN} {NEW}",
            write("text.txt", "é".encode("latin-1")),
        ),
        ("too short for block_size", f"{TRAIN} --model.block-size 84 {NEW}"),
        ("the run's text is gone", RESUME, remove("text.txt")),
        ("the run's text has changed", RESUME, write("text.txt", "Another. " * 99)),
        (
            "val.bin is missing",
            f"{TOKENS} {NEW}",
            remove("tokens/val.bin"),
        ),
        (
            "half a token in train.bin",
            f"{TOKENS} {NEW}",
            cut("tokens/train.bin", 999),
        ),
        (
            "too few tokens for block_size",
            f"{TOKENS} --model.block-size 100 {NEW}",
        ),
        (
            "a token outside the vocabulary",
            f"{TOKENS} {NEW}",
            write("tokens/val.bin", b"\x0b\x00" * 99),
        ),
        (
            "tokens without a vocabulary",
            f"{TOKENS} {NEW}",
            remove("tokens/meta.pkl"),
        ),
        (
            "a meta.pkl that runs a command",
            f"{TOKENS} {NEW}",
            write("tokens/meta.pkl", pickle.dumps({"itos": Malicious()})),
        ),
        (
            "a meta.pkl that is cut",
            f"{TOKENS} {NEW}",
            cut("tokens/meta.pkl", 50),
        ),
        (
            "a meta.pkl of something else",
            f"{TOKENS} {NEW}",
            write("tokens/meta.pkl", pickle.dumps({"vocab_size": 11})),
        ),
        (
            "a meta.pkl of words",
            f"{TOKENS} {NEW}",
            write("tokens/meta.pkl", pickle.dumps({"itos": {0: "to", 1: "be"}})),
        ),
    ],
    "Tokenizers": [
        ("a name that there is not", f"{TRAIN} --data.tokenizer gpt3 {NEW}"),
        ("a directory without one", f"{TRAIN} --data.tokenizer tokens {NEW}"),
        ("BPE of no size", f"{TRAIN} --data.tokenizer bpe {NEW}"),
        (
            "BPE of too few tokens",
            f"{TRAIN} --data.tokenizer bpe --model.vocab-size 256 {NEW}",
        ),
        (
            "BPE of more tokens than the text gives",
            f"{TRAIN} --data.tokenizer bpe --model.vocab-size 5000 {NEW}",
        ),
        (
            "BPE for what is tokens",
            f"{TOKENS} --data.tokenizer bpe --model.vocab-size 300 {NEW}",
        ),
        ("a size that is not the characters'", f"{TRAIN} --model.vocab-size 65 {NEW}"),
        (
            "a character outside its vocabulary",
            f"{TRAIN} --data.tokenizer own.json {NEW}",
            write("own.json", CharTokenizer("Tobe").to_json()),
        ),
        (
            "a tokenizer.json that is cut",
            f"{TRAIN} --data.tokenizer gpt2/tokenizer.json {NEW}",
            cut("gpt2/tokenizer.json", 99),
        ),
        (
            "a tokenizer.json of another kind",
            f"{TRAIN} --data.tokenizer gpt2/tokenizer.json {NEW}",
        ),
        (
            "tables that are none",
            f"{TRAIN} --data.tokenizer tables {NEW}",
            both(write("tables/vocab.json", "{"), write("tables/merges.txt")),
        ),
        ("the run's own, cut", RESUME, cut("runs/tiny/tokenizer.json", 30)),
        (
            "the run's own, of another run",
            GENERATE,
            write("runs/tiny/tokenizer.json", CharTokenizer("Tobe").to_json()),
        ),
    ],
    "Checkpoints": [
        ("a step that there is not", f"{GENERATE} --checkpoint 7"),
        ("a word for a step", f"{GENERATE} --checkpoint newest"),
        ("none yet", GENERATE, folder("runs/tiny/checkpoints")),
        ("their folder is gone", GENERATE, remove("runs/tiny/checkpoints")),
        ("their folder is a file", RESUME, write("runs/tiny/checkpoints")),
        ("all are damaged, to go on from", RESUME, damaged("runs/tiny")),
        ("all are damaged, to sample from", GENERATE, damaged("runs/tiny")),
        (
            "a damaged one, by its step",
            f"{EXPORT} nanogpt runs/tiny new.pt --checkpoint 8",
            damaged("runs/tiny"),
        ),
        (
            "one that was not saved to the end",
            GENERATE,
            remove("runs/tiny/checkpoints/8/_CHECKPOINT_METADATA"),
        ),
        (
            "a file of one is gone",
            GENERATE,
            remove("runs/tiny/checkpoints/8/params/manifest.ocdbt"),
        ),
        ("of another config", GENERATE, setting(TINY_CONFIG, "model", n_layer=3)),
        (
            "parameters alone, to go on from",
            "train.py --out-dir runs/imported --resume --data.path tokens",
        ),
    ],
    "Starting from another run": [
        ("it is no run", "train.py smoke --init-from runs"),
        ("it is a file", "train.py smoke --init-from text.txt"),
        ("it is where the new run goes", f"{START} --out-dir runs/tiny --overwrite"),
        ("and going on too", f"{START} --resume"),
        ("another number of layers", f"{START} --model.n-layer 3 {NEW}"),
        ("more positions than it has learnt", f"{START} --model.block-size 9 {NEW}"),
        ("another tokenizer", f"{START} --data.tokenizer char {NEW}"),
        ("a step that it has not", f"{START} --checkpoint 4 {NEW}"),
        (
            "text with other characters",
            f"{START} {NEW}",
            write("text.txt", "Zounds! " * 99),
        ),
        (
            "it has no tokenizer",
            f"train.py smoke --init-from runs/imported --data.path text.txt {NEW}",
        ),
        ("it is damaged", f"{START} {NEW}", damaged("runs/tiny")),
    ],
    "Devices and processes": [
        ("more devices than there are", f"{TRAIN} --mesh.data 64 {NEW}"),
        ("rows that do not divide", f"{TRAIN} --mesh.data 2 --data.batch-size 9 {NEW}"),
        ("no devices", "train.py smoke --mesh.data 0"),
        ("fewer than no devices", "train.py smoke --mesh.fsdp -2"),
        ("a negative number for tensor", "train.py smoke --mesh.tensor -1"),
        ("a lecture's model in parts", "train.py lecture-residual --mesh.fsdp 2"),
        ("heads that do not divide", f"{TRAIN} --model.n-head 1 --mesh.tensor 2 {NEW}"),
        (
            "positions that do not divide",
            f"{TRAIN} --model.block-size 9 --mesh.tensor 2 {NEW}",
        ),
        (
            "channels that do not divide",
            f"{TRAIN} --model.n-embd 33 --model.n-head 3 --mesh.fsdp 2 {NEW}",
        ),
        ("rows to share where there are none", f"{GENERATE} --mesh.data 2"),
        ("a process without the others' address", "train.py smoke --process-id 0"),
        ("a process beyond the last", f"{PROCESSES} 2 --coordinator-address host:1"),
        ("a process before the first", f"{PROCESSES} -1 --coordinator-address host:1"),
        (
            "no processes",
            "train.py smoke --num-processes 0 --process-id 0 --coordinator-address a:1",
        ),
        (
            "an address without a port",
            f"{PROCESSES} 0 --coordinator-address host",
        ),
    ],
    "What it would cost": [
        ("a topology that there is not", "train.py smoke --plan v99:2x2"),
        (
            "more devices than the topology has",
            "train.py smoke --plan v5e:1x1 --mesh.data 2",
        ),
        (
            "a model that does not fit",
            "train.py smoke --plan v5e:1x1 --model.block-size 8192 --model.n-head 64",
        ),
        ("text that is not there", "train.py smoke --dry-run --data.path tex.txt"),
    ],
    "generate.py": [
        ("no run is named", "generate.py"),
        ("a folder that is no run", "generate.py --run-dir runs"),
        ("a file for a run", "generate.py --run-dir text.txt"),
        ("a run without tokenizer", "generate.py --run-dir runs/imported"),
        ("a character outside the vocabulary", f"{GENERATE} --prompt ROMEO:"),
        ("a stop that can never come", f"{GENERATE} --stop '!'"),
        ("a prompt's file that is not there", f"{GENERATE} --prompt FILE:prompt.txt"),
        ("a prompt's file that is a folder", f"{GENERATE} --prompt FILE:tokens"),
        (
            "a prompt's file that is not UTF-8",
            f"{GENERATE} --prompt FILE:p.txt",
            write("p.txt", b"To \xff"),
        ),
        ("no tokens", f"{GENERATE} --max-new-tokens 0"),
        ("fewer than no tokens", f"{GENERATE} --max-new-tokens -5"),
        ("no samples", f"{GENERATE} --num-samples 0"),
        ("a word for a count", f"{GENERATE} --num-samples two"),
        ("a negative temperature", f"{GENERATE} --temperature -1"),
        ("a temperature that is no number", f"{GENERATE} --temperature nan"),
        ("none of the likeliest", f"{GENERATE} --top-k 0"),
        ("more than all of the likeliest", f"{GENERATE} --top-k 12"),
        ("odds of none", f"{GENERATE} --top-p 0"),
        ("odds above one", f"{GENERATE} --top-p 1.5"),
        ("a negative seed", f"{GENERATE} --seed -1"),
    ],
    "evaluate, attention, compare, lecture": [
        ("a command that there is not", f"{JAXGPT} evalute"),
        ("evaluate no run", f"{JAXGPT} evaluate --run-dir tokens"),
        ("a split that there is not", f"{EVALUATE} --split test"),
        ("a stride above block_size", f"{EVALUATE} --stride 9"),
        ("a stride of none", f"{EVALUATE} --stride 0"),
        ("no windows at once", f"{EVALUATE} --batch-size 0"),
        ("evaluate text that is not there", f"{EVALUATE} --data-path tex.txt"),
        (
            "evaluate text with other characters",
            f"{EVALUATE} --data-path text.txt",
            write("text.txt", "Zounds! " * 99),
        ),
        (
            "evaluate text without a tokenizer",
            f"{JAXGPT} evaluate --run-dir runs/imported --data-path text.txt",
        ),
        ("look at nothing", f"{ATTENTION} --prompt ''"),
        ("look at other characters", f"{ATTENTION} --prompt Zounds"),
        ("a picture in no folder", f"{ATTENTION} --prompt To --out no/maps.png"),
        (
            "a model that has no attention",
            f"{JAXGPT} attention --run-dir runs/bigram --prompt To",
        ),
        ("compare two at once", f"{COMPARE} --hf gpt2 --nanogpt ckpt.pt"),
        ("compare a checkpoint of no run", f"{COMPARE} --checkpoint 8"),
        ("compare a file that is not there", f"{COMPARE} --nanogpt no.pt"),
        ("compare a lecture's model", f"{COMPARE} --run-dir runs/bigram"),
        (
            "compare more than block_size tokens",
            f"{COMPARE} --run-dir runs/tiny --length 9",
        ),
        ("a lecture of no steps", f"{JAXGPT} lecture --steps-scale 0"),
        ("a lecture with a seed twice", f"{JAXGPT} lecture --seeds 7 7"),
        ("a lecture into a file", f"{JAXGPT} lecture --out-dir text.txt"),
    ],
    "import and export": [
        ("a format that there is not", f"{IMPORT} llama ckpt.pt runs/new"),
        ("no checkpoint there", f"{IMPORT} nanogpt no.pt runs/new"),
        ("a directory for a checkpoint", f"{IMPORT} nanogpt gpt2 runs/new"),
        ("an empty checkpoint", CKPT, write("ckpt.pt")),
        (
            "a checkpoint that is cut",
            CKPT,
            cut("ckpt.pt", 5000),
        ),
        (
            "a checkpoint that runs a command",
            CKPT,
            torch_file({"model": Malicious()}),
        ),
        (
            "a list for a checkpoint",
            CKPT,
            torch_file([1, 2]),
        ),
        (
            "a checkpoint of something else",
            CKPT,
            torch_file({"epoch": 3}),
        ),
        ("a file for a directory", f"{IMPORT} huggingface ckpt.pt runs/new"),
        ("a directory of no model", f"{IMPORT} huggingface tokens runs/new"),
        (
            "another kind of model",
            GPT2,
            setting("gpt2/config.json", "", model_type="llama"),
        ),
        (
            "an activation that is not ours",
            GPT2,
            setting("gpt2/config.json", "", activation_function="relu"),
        ),
        (
            "a config that says nothing",
            GPT2,
            write("gpt2/config.json", "{}"),
        ),
        (
            "weights of another shape",
            GPT2,
            setting("gpt2/config.json", "", n_positions=16),
        ),
        (
            "weights that are cut",
            GPT2,
            cut("gpt2/model.safetensors", 9999),
        ),
        (
            "no weights",
            GPT2,
            remove("gpt2/model.safetensors"),
        ),
        (
            "a tokenizer that is cut",
            GPT2,
            cut("gpt2/tokenizer.json", 99),
        ),
        (
            "a tokenizer of another size",
            f"{CKPT} --tokenizer own.json",
            write("own.json", CharTokenizer("Tobe").to_json()),
        ),
        (
            "two tokenizers",
            f"{CKPT} --meta tokens/meta.pkl --tokenizer gpt2",
        ),
        ("import over a run", f"{IMPORT} nanogpt ckpt.pt runs/tiny"),
        ("import over what is no run", f"{IMPORT} nanogpt ckpt.pt tokens --overwrite"),
        ("import into a file", f"{IMPORT} nanogpt ckpt.pt text.txt"),
        ("export no run", f"{EXPORT} nanogpt runs new.pt"),
        ("export a lecture's model to nanoGPT", f"{EXPORT} nanogpt runs/bigram new.pt"),
        (
            "export a lecture's model to Hugging Face",
            f"{EXPORT} huggingface runs/bigram new",
        ),
        ("export over a file", f"{EXPORT} nanogpt runs/tiny ckpt.pt"),
        ("export beside a meta.pkl", f"{EXPORT} nanogpt runs/tiny tokens/new.pt"),
        ("export over a directory's files", f"{EXPORT} huggingface runs/tiny gpt2"),
        (
            "export over a run",
            f"{EXPORT} huggingface runs/tiny runs/bigram --overwrite",
        ),
        (
            "export Hugging Face's into a file",
            f"{EXPORT} huggingface runs/tiny text.txt --overwrite",
        ),
        ("export into a file's folder", f"{EXPORT} nanogpt runs/tiny text.txt/new.pt"),
        (
            "export into a file's folder, to transformers",
            f"{EXPORT} huggingface runs/tiny text.txt/new",
        ),
        (
            "a data directory for Hugging Face",
            f"{EXPORT} huggingface runs/tiny new --dataset tiny",
        ),
    ],
}
ALL = [(group, *case) for group, cases in CASES.items() for case in cases]


# What differs between machines, runs and versions of libraries, and what stands for it.
VARYING = {
    r"there are \d+ devices": "there are N devices",
    r"\b([0-9a-f]{32}){1,2}\b": "...",  # digests, and names that Orbax gives
    r"\S+ needed per device, \S+ there": "... needed per device, ... there",
    r"(It says|while deserializing header|reading BPE files): .*": r"\1: ...",
}


def rows_of_page():
    """The page's rows, by heading and first cell."""
    rows, group = {}, ""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    for line in text.removeprefix(HEADING).splitlines():
        if line.startswith("| ") and not line.startswith("| what |"):
            rows[group, line.split(" | ")[0].removeprefix("| ")] = line
        elif line.startswith("## "):
            group = line.removeprefix("## ")
    return rows


def files(here):
    """Digests of all files but locks and the cache."""
    return {
        str(path.relative_to(here)): sha256(path.read_bytes()).hexdigest()
        for path in here.rglob("*")
        if path.is_file() and path.name != "lock" and here / "cache" not in path.parents
    }


def message_of(status, err, here):
    """What the error says, in one line that any machine gives alike."""
    if status == 2:  # tyro's box, with or without lines: a title, then the message
        err = re.sub(r"^╭─ (.*?) ─+╮$", r"\1\n-", err, flags=re.MULTILINE)
        message = re.split(r"\n[\s│─╰╯-]+(?:\n|$)", err)[1].replace("│", "")
    else:
        message = re.search(r"^error: (.+)\Z", err, re.MULTILINE | re.DOTALL)[1]
    message = " ".join(message.replace(str(here), "DIR").split())
    for pattern, shown in VARYING.items():
        message = re.sub(pattern, shown, message)
    return message


PRODUCED = {}


@pytest.mark.parametrize(
    "case", ALL, ids=[f"{group}: {case[0]}" for group, *case in ALL]
)
def test_bad_input_ends_in_one_line_as_on_the_page_and_loses_nothing(
    case, shelf, tmp_path, monkeypatch, capsys
):
    group, what, command, *setup = case
    if "--plan" in command and not find_spec("libtpu"):
        pytest.skip("libtpu is for Linux on x86-64")
    here = tmp_path / "here"
    shutil.copytree(shelf, here)
    monkeypatch.chdir(here)
    lock = setup[0]() if setup else None
    before = files(here)
    status, (out, err) = run(command, monkeypatch, capsys)
    if lock is not None:
        os.close(lock)

    assert status in (1, 2)
    assert "Traceback" not in err
    assert out == "" or "--plan" in command  # which tells what it knows before
    assert files(here) == before
    message = message_of(status, err, here)
    cells = (what, f"`python {command}`", str(status), message)
    row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    PRODUCED[group, what] = row
    if not WRITE:
        assert row == rows_of_page()[group, what]


def run(command, monkeypatch, capsys):
    """The exit status of `python COMMAND`, and what it printed."""
    script, *arguments = shlex.split(command)
    if script == "-m":
        script, *arguments = "jaxgpt/__main__.py", *arguments[1:]
    monkeypatch.setattr("sys.argv", [script, *arguments])
    monkeypatch.setattr(start, "start", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("JAXGPT_CACHE", "cache")
    monkeypatch.setenv("COLUMNS", "1000")  # of the boxes, so that no line is broken
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no look-out for other processes
    monkeypatch.delenv("JAXGPT_TRACEBACK", raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return stopped.value.code, capsys.readouterr()


def test_the_page_has_these_cases_and_no_others():
    if WRITE:
        assert PRODUCED, "write the page with -n0"
        PAGE.write_text(page(rows_of_page() | PRODUCED), encoding="utf-8")
    rows = rows_of_page()
    messages = {row.split(" | ", 3)[3] for row in rows.values()}
    assert len(messages) > 100
    assert list(rows) == [(group, what) for group, what, *_ in ALL]
    assert PAGE.read_text(encoding="utf-8") == page(rows)


def page(rows):
    text = HEADING
    for group, cases in CASES.items():
        text += (
            f"\n## {group}\n\n| what | command | exit | message |\n|---|---|---|---|\n"
        )
        text += "".join(rows[group, what] + "\n" for what, *_ in cases)
    return text
