"""What all tests share: a cache, 8 CPU devices, a small corpus and a tiny model."""

import dataclasses
import gc
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings

import generate
import train
from jaxgpt import (
    CharTokenizer,
    Config,
    DataConfig,
    GPTConfig,
    LectureConfig,
    OptimizerConfig,
    TrainConfig,
    __main__,
    start,
)
from jaxgpt.config import (
    AnyModelConfig,
    ClassifierConfig,
    DPOConfig,
    MaskedLMConfig,
    RewardConfig,
    Seq2SeqConfig,
)
from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.parallel.feeding import batch_shapes
from jaxgpt.parallel.mesh import make_mesh, replicated, single_device_mesh
from jaxgpt.run import Run, save_config
from jaxgpt.text import assistant, chitchat
from jaxgpt.text.conversations import CHAT_TOKENS
from jaxgpt.text.examples import (
    LabelledTexts,
    MaskedTexts,
    Preferences,
    Sequences,
    TextPairs,
)
from jaxgpt.text.tokenizer import END_OF_TEXT, MASK
from jaxgpt.training import checkpoint
from jaxgpt.training.checkpoint import open_checkpoints, save_state
from jaxgpt.training.monitor import read_rows
from jaxgpt.training.objectives import next_token
from jaxgpt.training.step import TrainState, abstract_state, trace_train_steps

ROOT = Path(__file__).parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"  # also where there is an accelerator
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of PyTorch; xdist has a worker per core
os.environ["JAXGPT_CACHE"] = str(ROOT / ".pytest_cache" / "jaxgpt")
jax.config.update("jax_platforms", "cpu")  # JAX may have read the environment before
jax.config.update("jax_num_cpu_devices", 8)
# The tests build the same programs over and over, as a user's runs do.
jax.config.update("jax_compilation_cache_dir", os.environ["JAXGPT_CACHE"] + "/xla")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
# Most run once: XLA and LLVM would take longer than they save.
jax.config.update("jax_disable_most_optimizations", True)
COMPILE_FAST = {
    # XLA's emitters of fusions by MLIR compile the programs of the tests in twice the
    # time of those before them.
    "xla_cpu_use_fusion_emitters": "false",
    # xdist has a worker per core, so parts of a program are not compiled in parallel.
    "xla_cpu_parallel_codegen_split_count": "1",
}
# XLA reads its flags once, with the first device. Scripts run as a user's do.
with pytest.MonkeyPatch.context() as patch:
    known = (name for name in COMPILE_FAST if start._measured_and_known(name))
    flags = [f"--{name}={COMPILE_FAST[name]}" for name in known]
    patch.setenv("XLA_FLAGS", " ".join([os.environ.get("XLA_FLAGS", ""), *flags]))
    jax.devices()
# As in `start`: if several files can't be read or written, it logs all but one.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)

needs_libtpu = pytest.mark.skipif(
    not find_spec("libtpu"), reason="libtpu is for Linux on x86-64"
)

TEXT = "".join(
    f"{word} tells a tale of {n} winters.\n"
    for n, word in enumerate(["Juliet", "Romeo", "Hamlet", "Lear", "Puck"] * 60)
)

TINY = Config(
    model=GPTConfig(
        n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11, dropout=0.3
    ),
    data=DataConfig(batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=2),
    train=TrainConfig(
        max_steps=8, eval_interval=4, eval_iters=2, steps_per_call=1, seed=3
    ),
)
# Models that are trained on examples, by architecture; "dpo" is a GPT.
EXAMPLE_KINDS = {
    "classifier": ClassifierConfig,
    "masked-lm": MaskedLMConfig,
    "seq2seq": Seq2SeqConfig,
    "reward": RewardConfig,
    "dpo": GPTConfig,
}
ONE_ROW = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])  # tokens for TINY
PLATFORMS = ("cpu", "tpu", "cuda", "gpu")  # as in jaxgpt.ops

# Every case has the time it needs; CI's are the same ones each time.
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.register_profile("full", deadline=None, max_examples=10_000)


def pytest_addoption(parser):
    help = "the full counts of docs/reliability.md: kills, and fuzzed files"
    parser.addoption("--full", action="store_true", help=help)


def pytest_configure(config):
    settings.load_profile("full" if config.getoption("full") else "ci")


def pytest_collection_finish():
    gc.freeze()  # so that collections skip the million objects of imported modules
    gc.set_threshold(20_000)


def tpu(test):
    """Marks a test that compiles for TPUs, where the compiler can be installed."""
    return pytest.mark.tpu(needs_libtpu(test))


def changed(config: Config, **sections: dict[str, object]) -> Config:
    """The config with fields of its sections replaced.

    A model of another architecture takes over the fields that it has.
    """
    replaced = {}
    for name, fields in sections.items():
        section, kind = getattr(config, name), type(getattr(config, name))
        if "architecture" in fields:
            kinds = {kind.architecture: kind for kind in get_args(AnyModelConfig)}
            kind = kinds.get(fields["architecture"], LectureConfig)
        values = vars(section) | fields
        known = {field.name for field in dataclasses.fields(kind)} | fields.keys()
        replaced[name] = kind(**{key: values[key] for key in values if key in known})
    return dataclasses.replace(config, **replaced)


def examples_config(folder, architecture, tokenizer="char"):
    """TINY's config for another architecture, on a corpus that it writes.

    240 texts of three labels, or pairs of a text and its reversal, or prompts and two
    responses. With DPO it also writes the run that training starts from.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 20, 240)
    texts = ["".join(rng.choice(list("abcdefgh"), size)) for size in sizes]
    if architecture == "seq2seq":
        path, lines = folder / "pairs.tsv", [f"{text}\t{text[::-1]}" for text in texts]
    elif architecture in ("reward", "dpo"):
        path = folder / "preferences.jsonl"
        rows = (dict(prompt=text, chosen="a" * 3, rejected="hg") for text in texts)
        lines = map(json.dumps, rows)
    else:
        path, lines = folder / "labelled.csv", ["text,label"]
        lines += [f"{text},{n % 3 + 7}" for n, text in enumerate(texts)]
    path.write_text("\n".join(lines))
    config = changed(
        TINY,
        model={
            "architecture": "gpt" if architecture == "dpo" else architecture,
            "n_layer": 1,
            "block_size": 24,
            "vocab_size": None if tokenizer == "char" else 270,
        },
        data={"path": (str(path),), "tokenizer": tokenizer},
        train={"log_interval": 1},
        mesh={"data": 1},
    )
    if architecture != "dpo":
        return config
    characters = CharTokenizer("abcdefgh")
    config = changed(config, model={"vocab_size": characters.vocab_size})
    with open_checkpoints(folder / "start" / "checkpoints") as checkpoints:
        params = random_params(build_model(config.model, "cpu"), std=0.2)
        save_params(checkpoints, 8, params)
    save_config(folder / "start", config, characters)
    start = {"init_from": str(folder / "start" / "checkpoints" / "8")}
    tokenizer = {"tokenizer": str(folder / "start" / "tokenizer.json")}
    config = changed(config, train=start, data=tokenizer)
    return dataclasses.replace(config, dpo=DPOConfig())


def conversations_config(folder, name="chats", size=3):
    """TINY's config for conversations of characters, in a file that it writes.

    Every third one has a system turn; the longest do not fit a row.
    """
    rng, lines = np.random.default_rng(len(name)), []
    for n in range(60):
        texts = ["".join(rng.choice(list("abcdefgh"), size)) for _ in range(2 + n % 9)]
        roles = ["user", "assistant"] * (len(texts) // 2)
        roles = roles if n % 3 else ["system", *roles]
        pairs = zip(roles, texts, strict=False)
        messages = [{"role": role, "content": text} for role, text in pairs]
        if messages[-1]["role"] == "assistant":
            lines.append(json.dumps({"messages": messages}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return changed(
        TINY,
        model={"n_layer": 1, "block_size": 32, "vocab_size": None},
        data={"path": (str(path),), "packing": "conversations"},
        train={"log_interval": 1},
        mesh={"data": 1},
    )


def random_examples(architecture, lengths):
    """Examples of random tokens below 11, and TINY's config for them.

    They have one of three labels; targets are as long as their sources, and rejected
    texts as their chosen ones.
    """
    rng = np.random.default_rng(0)
    texts, targets = (
        Sequences.join(rng.integers(11, size=length) for length in lengths)
        for _ in range(2)
    )
    labels = np.arange(len(lengths), dtype=np.int32) % 3
    pairs = Sequences.join(
        text for pair in zip(texts, targets, strict=True) for text in pair
    )
    log_probs_N2 = rng.normal(-9, 1, (len(lengths), 2)).astype(np.float32)
    examples = {
        "classifier": LabelledTexts(texts, labels, np.array([""] * len(lengths))),
        "masked-lm": MaskedTexts(texts, mask_token=10, vocab_size=11, mask_prob=0.4),
        "seq2seq": TextPairs(texts, targets, end_of_text=0),
        "reward": Preferences(pairs, np.ones(len(lengths), np.int64)),
        "dpo": Preferences(pairs, np.ones(len(lengths), np.int64), log_probs_N2),
    }
    model = {"architecture": architecture, "n_layer": 1, "block_size": 16}
    if architecture == "classifier":
        model["labels"] = ("a", "b", "c")
    if architecture == "dpo":
        config = changed(TINY, model=model | {"architecture": "gpt"})
        return examples["dpo"], dataclasses.replace(config, dpo=DPOConfig())
    return examples[architecture], changed(TINY, model=model)


def build(**fields):
    """A model like TINY's with some fields changed."""
    return build_model(changed(TINY, model=fields).model, "cpu")


def init_model(**fields):
    """Such a model, and its initial parameters."""
    model = build(**fields)
    return model, jax.jit(model.init)(jax.random.key(0), ONE_ROW[:, :1])["params"]


def random_run(config, tokenizer):
    """A run of initial parameters."""
    model = build_model(config.model, "cpu")
    params = jax.jit(model.init)(jax.random.key(0), ONE_ROW[:, :2])["params"]
    params = jax.device_put(params, replicated(single_device_mesh()))
    return Run(config, tokenizer, model, params, 0)


def random_params(model, mean=0.2, std=0.4):
    """Parameters from a normal distribution, so that no scale is 1 and no bias 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: rng.normal(mean, std, leaf.shape).astype(np.float32),
        parameter_shapes(model.config),
    )


def train_on(model, config, mesh, state, batches):
    """Takes a train step of each of the batches, in one call."""
    traced = trace_train_steps(next_token(model), config, mesh, state, batches)
    return traced.lower().compile()(state, batches)


def traced_steps(model, config, mesh, count=1):
    """Train steps of so many batches, traced without devices."""
    state = abstract_state(model, config, mesh)
    batches = batch_shapes(config, mesh, count)
    return trace_train_steps(next_token(model), config, mesh, state, batches)


def save_params(checkpoints, step, params):
    """Saves parameters without an optimizer's state, as an import does."""
    save_state(checkpoints, TrainState(np.int32(step), params, None), None)


def start_script(*arguments, **environment):
    """Starts `python ARGUMENTS` as a process in the repository, as a user does."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, code=0, timeout=1200):
    """Waits for a script to exit with `code`; returns stdout and stderr."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return out, err


def terminal_as_stderr(monkeypatch):
    """Replaces stderr by a terminal; getvalue() of the result is what it shows."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    return terminal


def losses(run_dir):
    """The training loss that a run logged at each step."""
    rows = read_rows(run_dir / "metrics.jsonl")
    found = {row["step"]: row["loss"] for row in rows if row["event"] == "train"}
    assert found
    return found


def contents(folder):
    """All files below a folder, as bytes by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def mesh_of(config):
    """The config's mesh, over the 8 CPU devices of the tests."""
    return make_mesh(config, log=lambda line: None)


def assert_every_flag_is_explained(help_text):
    """Whether tyro has found words for each flag."""
    _, options = help_text.replace("│", "").split(" options ", 1)
    text = " ".join(options.split())
    flags = re.findall(r"(?<!\()--[a-z.-]+", text)
    assert len(flags) > 1  # one besides --help
    for flag in flags:
        values_and_help = text.split(f"{flag} ")[1]
        values_and_help = re.split(r"\((?:default|required)", values_and_help)[0]
        assert re.search(r"[a-z]+ [a-z]+", values_and_help), flag


@partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    """Logits without dropout."""
    return model.apply({"params": params}, tokens)


@partial(jax.jit, static_argnums=0)
def dropped_logits(model, params, tokens, rows):
    """Logits with dropout on; `rows` are the rows' numbers in the whole batch."""
    return model.apply(
        {"params": params},
        tokens,
        deterministic=False,
        rows_B=rows,
        rngs={"dropout": jax.random.key(5)},
    )


@pytest.fixture(scope="session")
def make_once(tmp_path_factory, worker_id):
    """Makes a named folder once per session: the workers of xdist share it.

    `make_once(name, make)` calls `make(folder)` if no worker has done so before, and
    returns the folder. Tests must not change its files.
    """
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def make_once(name, make):
        folder = base / name
        with FileLock(f"{folder}.lock"):
            if not folder.with_suffix(".done").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                folder.with_suffix(".done").touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def smoke(make_once):
    """`python train.py smoke`, uninterrupted: its directory, stdout and stderr."""

    def make(folder):
        script = start_script("train.py", "smoke", "--out-dir", folder / "run")
        (folder / "texts").write_text(json.dumps(finish(script)))

    folder = make_once("smoke", make)
    return folder / "run", *json.loads((folder / "texts").read_text())


@pytest.fixture
def small_assistant(tmp_path, monkeypatch):
    """Makes the assistant's corpus of so many tasks, and of openings of small talk."""

    def make(tasks, openings):
        roles = "user", "assistant", "user", "assistant"
        lines = []
        for opening in openings:
            pairs = zip(roles, (*opening, "More?", "No."), strict=True)
            messages = [{"role": role, "content": text} for role, text in pairs]
            lines.append(json.dumps({"messages": messages}) + "\n")
        path = tmp_path / "talk.jsonl"
        path.write_text("".join(lines))
        monkeypatch.setattr(chitchat, "find_conversations", lambda log: path)
        monkeypatch.setattr(assistant, "_TASKS", tasks)
        assistant.make_tasks.cache_clear()

    yield make
    assistant.make_tasks.cache_clear()


@pytest.fixture(scope="session")
def bigram():
    """A bigram model and its initial parameters."""
    return init_model(architecture="bigram")


@pytest.fixture(scope="session")
def tiny_run(make_once):
    """The directory of a tiny model trained for 8 steps on a small text."""

    def make(folder):
        text = folder / "text.txt"
        text.write_text("To be, or not to be.\n" * 40)
        every = {"eval_interval": 8, "log_interval": 1}
        config = changed(TINY, model={"vocab_size": None}, train=every)
        config = changed(config, data={"path": (str(text),)})
        train.train(config, folder / "run", resume=False, overwrite=False)

    return make_once("tiny_run", make) / "run"


@pytest.fixture(scope="session")
def untrained(make_once):
    """A folder with a run of each kind of model, named after its architecture.

    Its parameters are random, its tokens characters; labels are no, perhaps and yes.
    `chat` is a GPT with the special tokens of conversations, which have a logit of 0:
    its greedy answers never end.
    """
    characters = CharTokenizer("".join(sorted(set(TEXT))))
    of_kind = {"classifier": {"labels": ("no", "perhaps", "yes")}}
    corpora = {"seq2seq": "tatoeba", "classifier": "reviews", "masked-lm": "reviews"}

    def make(folder):
        for kind in ("gpt", "layer-norm", "bigram", "chat", "reward", *corpora):
            data = {"corpus": corpora.get(kind, "tinyshakespeare")}
            special, architecture = (END_OF_TEXT, MASK), kind
            if kind == "chat":
                data = {"corpus": "chitchat", "packing": "conversations"}
                special, architecture = CHAT_TOKENS, "gpt"
            tokenizer = characters.with_special(special)
            fields = {"architecture": architecture, "vocab_size": tokenizer.vocab_size}
            fields |= of_kind.get(kind, {})
            config = changed(TINY, model=fields | {"block_size": 64}, data=data)
            with open_checkpoints(folder / kind / "checkpoints") as checkpoints:
                params = random_params(build_model(config.model, "cpu"), std=0.2)
                if kind == "chat":
                    params["wte"]["embedding"][-len(special) :] = 0
                save_params(checkpoints, 8, params)
            save_config(folder / kind, config, tokenizer)

    return make_once("untrained", make)


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a script's or `python -m jaxgpt`'s main here; returns stdout and stderr."""
    mains = {"train.py": train, "generate.py": generate, "jaxgpt": __main__}
    monkeypatch.setattr(start, "start", start.encode_output)

    def call(script, *arguments, status=0):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capsys.readouterr()
        assert (mains[script].main() or 0) == status
        return capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """To collect garbage takes seconds among what a thousand tests have left."""
    monkeypatch.setattr(checkpoint, "release_memory", lambda: None)


@pytest.fixture
def text_file(tmp_path):
    """A small corpus of the user's own."""
    path = tmp_path / "tales.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    """An empty cache folder for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("JAXGPT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_model():
    """A GPT of two layers with parameters that are not small, and those parameters."""
    model, params = init_model()
    # GPT-2's small initialisation makes every logit nearly 0, and a test blind.
    return model, jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, params)
