"""Bad input, as users give it: each ends in a short error that names what is wrong.

docs/bad-input.md shows all cases with their messages. This command writes its tables:
JAXGPT_WRITE_TABLE=1 pytest -n0 -m "" tests/reliability/test_bad_input.py
"""

import dataclasses
import gzip
import io
import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, changed, contents, save_params

from jaxgpt import CharTokenizer, load_run, start
from jaxgpt.interop.huggingface import write_huggingface
from jaxgpt.interop.nanogpt import write_nanogpt
from jaxgpt.run import fcntl, load_state, save_config
from jaxgpt.text.pretrained import save_nanogpt_meta
from jaxgpt.text.tokenizer import END_OF_TEXT
from jaxgpt.training.checkpoint import open_checkpoints

PAGE = ROOT / "docs" / "bad-input.md"


class Malicious:
    """Its pickle runs a shell command that creates a file."""

    def __reduce__(self):
        return os.system, ("touch HACKED",)


def torch_file(content):
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(path):
    """Puts an empty folder in place of a file or folder."""
    remove(path)
    path.mkdir()


def make_pipe(path):
    """Puts a pipe, which can be read only once, in place of a file."""
    remove(path)
    os.mkfifo(path)


def corrupt(checkpoints):
    """Flips a bit in the parameters of each checkpoint."""
    for path in checkpoints.rglob("params/**/d/*"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def with_nan(path):
    """Makes an element of a nanoGPT's position embedding NaN."""
    checkpoint = torch.load(path)
    checkpoint["model"]["transformer.wpe.weight"][0, 0] = float("nan")
    torch.save(checkpoint, path)


def lock(path):
    """Locks a run as a training process does, until the returned file is closed."""
    file = path.open()
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def hide(package):
    """Makes Python find no such package, until the result is closed."""
    patch, held = pytest.MonkeyPatch(), ExitStack()
    patch.setitem(sys.modules, package.name, None)
    held.callback(patch.undo)
    return held


def change(path, new):
    """Makes a case's change to a file; returns what to close at the end, or None."""
    if callable(new):
        return new(path)
    if isinstance(new, int):
        return os.truncate(path, new)
    if isinstance(new, dict):
        old = json.loads(path.read_text())
        merged = {k: old[k] | v if isinstance(v, dict) else v for k, v in new.items()}
        new = json.dumps(old | merged)
    if path.is_dir():
        remove(path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(new if isinstance(new, bytes) else new.encode())


SMOKE = "train.py smoke"
TRAIN, TOKENS = f"{SMOKE} --data.path text.txt", f"{SMOKE} --data.path tokens"
TOKENIZER, BPE = f"{TRAIN} --data.tokenizer", f"{TRAIN} --data.tokenizer bpe"
RESUME = "train.py --out-dir runs/tiny --resume"
SENTIMENT = "train.py sentiment --data.tokenizer char --model.vocab-size None"
LABELLED, PAIRS = f"{SENTIMENT} --data.path rows.csv", "train.py reverse"
LABELS = "text,label\nfine,1\n"
CHAT = f"{SMOKE} --data.packing conversations"
CHATS = f"{CHAT} --data.path a.jsonl"
CONVERSATION = (
    '{"messages": [{"role": "user", "content": "Hi"}, '
    '{"role": "assistant", "content": "Lo"}]}\n'
)
PREFERENCES = "train.py reward --init-from runs/tiny --data.path a.jsonl"
PREFERENCE = '{"prompt": "To", "chosen": "be", "rejected": "not"}\n'
HI = '[{"role": "user", "content": "To"}]'
INIT_FROM = f"{TRAIN} --init-from runs/tiny"
GRPO = "train.py assistant-grpo --init-from runs/tiny"
PPO = "train.py ppo --init-from runs/tiny --data.path a.jsonl"
DISTRIBUTED = f"{SMOKE} --num-processes 2 --process-id"
ADDRESS = "--coordinator-address host:1"
GENERATE = "generate.py --run-dir runs/tiny"
EVALUATE = "-m jaxgpt evaluate --run-dir runs/tiny"
CLASSIFIER = "-m jaxgpt evaluate --run-dir runs/classifier"
CLASSIFY = "-m jaxgpt classify --run-dir runs/classifier"
CHATTING = "-m jaxgpt chat --run-dir runs/chat"
TRANSLATE = "-m jaxgpt translate --run-dir runs/seq2seq"
ATTENTION = "-m jaxgpt attention --run-dir runs/tiny"
COMPARE, LECTURE = "-m jaxgpt compare", "-m jaxgpt lecture"
REVIEWS = "-m jaxgpt rlhf-reviews --out-dir new --reviews reviews.jsonl"
PREPARE = "-m jaxgpt prepare --tokenizer char --out-dir new"
IMPORT, EXPORT = "-m jaxgpt import", "-m jaxgpt export"
CKPT = f"{IMPORT} nanogpt ckpt.pt runs/tiny --overwrite"
GPT2 = f"{IMPORT} huggingface gpt2 runs/tiny --overwrite"
TO_GPT2 = f"{EXPORT} huggingface runs/tiny"

CONFIG, RUN_JSON = "runs/tiny/config.json", "runs/tiny/tokenizer.json"
CHECKPOINTS, STEP_8 = "runs/tiny/checkpoints", "runs/tiny/checkpoints/8"
VAL, META = "tokens/val.bin", "tokens/meta.pkl"
GPT2_CONFIG, JSON = "gpt2/config.json", "gpt2/tokenizer.json"
CHARACTERS = CharTokenizer("Tobe").to_json()
OWN, OTHER_TEXT = {"own.json": CHARACTERS}, {"text.txt": "Zounds! " * 99}
DAMAGED = {CHECKPOINTS: corrupt}
PREPARED = f"{SMOKE} --data.path new"
OTHER_TOKENS = {f"other/{name}": b"\0\0" * 99 for name in ("train.bin", "val.bin")}
OTHER_TOKENS |= {"other/tokenizer.json": CHARACTERS}
SHARD = {"name": "train_000.bin", "tokens": 2, "documents": 1, "largest_token": 1}
MANIFEST = {"format": 1, "settings": {}, "tokenizer": "", "vocab_size": 4}
MANIFEST |= {"end_of_text": 3, "sources": [], "documents": 1, "duplicates": 0}
MANIFEST = json.dumps(MANIFEST | {"shards": [SHARD | {"sha256": ""}]})

# By group: the mistake, the command, and what the message must name, separated by
# spaces; then the files that differ from what the page describes. A file is given its
# content, the length it is truncated to, new values of its JSON, or a function that
# changes it. The first case of each group is run by default, the others as `messages`.
# fmt: off
CASES = {
    "The command line of train.py": [
        ("a misspelt preset", "train.py shakespear", "'shakespear' shakespeare-char?"),
        ("a preset after the flags", "train.py --train.seed 7 smoke", "smoke"),
        ("an unknown flag", f"{SMOKE} --model.layers 3", "--model.layers"),
        ("a float for an integer", f"{SMOKE} --train.max-steps 1e3", "1e3"),
        ("an unknown choice", f"{SMOKE} --model.gelu fast", "--model.gelu 'fast'"),
        ("a flag without its value", f"{SMOKE} --out-dir", "--out-dir"),
        ("a value for a boolean flag", f"{SMOKE} --model.bias yes", "yes"),
        ("resume and overwrite", f"{SMOKE} --resume --overwrite", "--resume --over"),
        ("a checkpoint of no run", f"{SMOKE} --checkpoint latest", "--init-from"),
    ],
    "Values of the config": [
        ("heads that do not divide", f"{SMOKE} --model.n-head 5", "n_embd=64 n_head=5"),
        ("too many layers", f"{SMOKE} --model.n-layer 3000000000", "n_layer="),
        ("a block size of 0", f"{SMOKE} --model.block-size 0", "block_size=0"),
        ("a vocabulary of 0 tokens", f"{SMOKE} --model.vocab-size 0", "vocab_size=0"),
        ("a dropout of 1", f"{SMOKE} --model.dropout 1", "dropout=1"),
        ("a learning rate of 0", f"{SMOKE} --optimizer.learning-rate 0", "rate=0"),
        ("a minimum above the peak", f"{SMOKE} --optimizer.min-lr 1", "min_lr=1"),
        ("a beta2 of 1", f"{SMOKE} --optimizer.beta2 1", "beta2=1"),
        ("a negative norm", f"{SMOKE} --optimizer.grad-clip -1", "grad_clip=-1"),
        ("no steps", f"{SMOKE} --train.max-steps 0", "max_steps=0"),
        ("a negative count", f"{SMOKE} --train.max-skipped-steps -1", "=-1"),
        ("a seed above 32 bits", f"{SMOKE} --train.seed 4294967296", "seed=4294967296"),
        ("uneven microbatches", f"{SMOKE} --data.gradient-accumulation-steps 5", "=5"),
        ("a batch size of 0", f"{SMOKE} --data.batch-size 0", "batch_size=0"),
        ("documents for a lecture model",
         "train.py lecture-bigram --data.packing documents", "=documents =bigram"),
        ("a field of other models", "train.py lecture-bigram --model.n-embd 32",
         "n-embd"),
    ],
    "Examples to classify or to translate": [
        ("a CSV without its columns", LABELLED, "rows.csv text label",
         {"rows.csv": "review;label\nfine;1\n"}),
        ("a row without its label", LABELLED, "rows.csv:3",
         {"rows.csv": LABELS + "a\n"}),
        ("a text with a comma", LABELLED, "rows.csv:3",
         {"rows.csv": LABELS + "a,b,1\n"}),
        ("an open quote", LABELLED, "rows.csv:3", {"rows.csv": LABELS + '"a,1\n'}),
        ("a single label", LABELLED, "['1'] two",
         {"rows.csv": LABELS + "".join(f"{n},1\n" for n in range(99))}),
        ("labels without one of the corpus", f"{LABELLED} --model.labels 1 2",
         "'3' labels", {"rows.csv": LABELS + "".join(f"{n},3\n" for n in range(99))}),
        ("one label", f"{LABELLED} --model.labels 1", "labels ('1',) two"),
        ("a header of pairs", f"{PAIRS} --data.path rows.tsv", "rows.tsv:1 header",
         {"rows.tsv": "source\ttarget\na\tb\n"}),
        ("a line that is no JSON", f"{SENTIMENT} --data.path rows.jsonl",
         "rows.jsonl:2", {"rows.jsonl": '{"text": "a", "label": 1}\noops\n'}),
        ("three columns for two", f"{PAIRS} --data.path rows.tsv", "rows.tsv:2 3",
         {"rows.tsv": "a\tb\nc\td\te\n"}),
        ("a text file", f"{SENTIMENT} --data.path text.txt", "text.txt .csv .jsonl"),
        ("a folder of tokens", f"{SENTIMENT} --data.path tokens", "tokens .csv"),
        ("a corpus without labels", f"{SENTIMENT} --data.corpus tinyshakespeare",
         "tinyshakespeare classifier reviews"),
        ("pairs for a GPT", f"{SMOKE} --data.corpus reverse", "reverse gpt"),
        ("languages of another corpus", "train.py reverse --data.languages en-fr",
         "en-fr tatoeba reverse"),
        ("packed examples", f"{SENTIMENT} --data.packing documents", "classifier"),
        ("starting from a GPT", f"{LABELLED} --init-from runs/tiny",
         "runs/tiny classifier gpt"),
    ],
    "Conversations": [
        ("a line that is no conversation", CHATS, "a.jsonl:1 messages",
         {"a.jsonl": '{"text": "a"}\n'}),
        ("roles out of order", CHATS, "a.jsonl:2 user assistant",
         {"a.jsonl": CONVERSATION + CONVERSATION.replace("assistant", "user")}),
        ("an unknown role", CHATS, "a.jsonl:1 'bot' assistant",
         {"a.jsonl": CONVERSATION.replace("assistant", "bot")}),
        ("an empty answer", CHATS, "a.jsonl:1 assistant empty",
         {"a.jsonl": CONVERSATION.replace("Lo", " ")}),
        ("content that is no text", CHATS, "a.jsonl:1 content",
         {"a.jsonl": CONVERSATION.replace('"Lo"', "1")}),
        ("no answer at the end", CHATS, "a.jsonl:1 user assistant",
         {"a.jsonl": '{"messages": [{"role": "user", "content": "Hi"}]}\n'}),
        ("an empty file of conversations", CHATS, "a.jsonl", {"a.jsonl": "\n"}),
        ("conversations in a text file", f"{CHAT} --data.path text.txt",
         "text.txt .jsonl"),
        ("conversations in a folder of tokens", f"{CHATS} tokens", "tokens .jsonl",
         {"a.jsonl": CONVERSATION}),
        ("conversations that are read as documents", f"{SMOKE} --data.path a.jsonl",
         "a.jsonl:1 text --data.packing conversations", {"a.jsonl": CONVERSATION}),
        ("conversations that are prepared", f"{PREPARE} a.jsonl",
         "a.jsonl:1 text --data.packing conversations", {"a.jsonl": CONVERSATION}),
        ("too few conversations", CHATS, "split hash", {"a.jsonl": CONVERSATION}),
        ("no conversation that fits a row", CHATS, "split block_size=32",
         {"a.jsonl": CONVERSATION.replace("Lo", "Lo" * 99)}),
        ("a line of conversations that is broken", CHATS, "a.jsonl:2 JSON column",
         {"a.jsonl": CONVERSATION + CONVERSATION[:-3]}),
        ("compressed conversations", f"{CHATS}.gz", "a.jsonl.gz gunzip",
         {"a.jsonl.gz": gzip.compress(CONVERSATION.encode())}),
        ("another corpus of conversations", f"{CHAT} --data.corpus reviews",
         "reviews packing=conversations chitchat"),
        ("weights of the built-in conversations",
         f"{CHAT} --data.corpus chitchat --data.weights 1", "weights=(1.0,) 0"),
        ("conversations for an encoder", f"{SENTIMENT} --data.packing conversations",
         "packing=conversations classifier"),
        ("conversations for a run without a tokenizer",
         f"{CHATS} --init-from runs/imported --model.block-size 8", "runs/imported",
         {"a.jsonl": CONVERSATION}),
    ],
    "Preferences": [
        ("a line without its responses", PREFERENCES, "a.jsonl:1 chosen",
         {"a.jsonl": '{"prompt": "To"}\n'}),
        ("a line without a prompt", PREFERENCES, "a.jsonl:1 messages",
         {"a.jsonl": '{"chosen": "be", "rejected": "not"}\n'}),
        ("two responses that are the same", PREFERENCES, "a.jsonl:1 chosen rejected",
         {"a.jsonl": '{"prompt": "To", "chosen": "be", "rejected": "be"}\n'}),
        ("too few preferences", PREFERENCES, "split hash", {"a.jsonl": PREFERENCE}),
        ("no response that fits", PREFERENCES, "split block_size=8",
         {"a.jsonl": PREFERENCE.replace("be", "be" * 9)}),
        ("no preferences", "train.py reward --init-from runs/tiny", "--data.path"),
        ("messages for a run without their tokens", PREFERENCES, "special tokens",
         {"a.jsonl": PREFERENCE.replace('"prompt": "To"', f'"messages": {HI}')}),
        ("weights of preferences", f"{PREFERENCES} --data.weights 1", "--data.weights",
         {"a.jsonl": PREFERENCE}),
        ("DPO of no run", "train.py dpo --data.path a.jsonl", "dpo --init-from",
         {"a.jsonl": PREFERENCE}),
        ("a reward model from a bigram model",
         f"{PREFERENCES.replace('tiny', 'bigram')}", "architecture=bigram",
         {"a.jsonl": PREFERENCE}),
    ],
    "The run directory": [
        ("it has a run", f"{TRAIN} --out-dir runs/tiny", "runs/tiny --overwrite"),
        ("it has no run", "train.py --out-dir runs/none --resume", "runs/none"),
        ("it is a file", f"{TRAIN} --out-dir text.txt", "text.txt"),
        ("it is below a file", f"{TRAIN} --out-dir text.txt/run", "text.txt/run"),
        ("overwriting other files", f"{TRAIN} --out-dir gpt2 --overwrite", "gpt2"),
        ("another process trains in it", RESUME, "runs/tiny", {"runs/tiny/lock": lock}),
        ("another model", f"{RESUME} --model.n-layer 3", "--model.n-layer 3 2"),
        ("another tokenizer", f"{RESUME} --data.tokenizer gpt2", "--data.tokenizer"),
        ("fewer steps than made", f"{RESUME} --train.max-steps 4", "max_steps=4 8"),
        ("a truncated config.json", RESUME, CONFIG, {CONFIG: 100}),
        ("a folder named config.json", RESUME, CONFIG, {CONFIG: make_folder}),
        ("an unknown field", RESUME, "layers", {CONFIG: {"model": {"layers": 2}}}),
        ("text for a number", RESUME, "seed='x'", {CONFIG: {"train": {"seed": "x"}}}),
    ],
    "Text and tokens": [
        ("a file that does not exist", f"{SMOKE} --data.path tex.txt", "tex.txt"),
        ("a folder of tokens among files", f"{TRAIN} tokens", "tokens --data.path"),
        ("a folder without text", f"{SMOKE} --data.path gpt2", "DIR/gpt2 train.bin"),
        ("a pipe", TRAIN, "text.txt save", {"text.txt": make_pipe}),
        ("an empty file", TRAIN, "text.txt", {"text.txt": ""}),
        ("text that is not UTF-8", TRAIN, "text.txt UTF-8", {"text.txt": b"\xe9"}),
        ("text in UTF-16", TRAIN, "text.txt UTF-16", {"text.txt": b"\xff\xfee\0"}),
        ("too short a text", f"{TRAIN} --model.block-size 84", "84 block_size"),
        ("documents of characters", f"{TRAIN} --data.packing documents",
         "packing=documents --data.tokenizer"),
        ("documents without ends",
         f"{BPE} --model.vocab-size 257 --data.packing documents", "packing=documents"),
        ("the run's text is missing", RESUME, "text.txt", {"text.txt": remove}),
        ("the run's text has changed", RESUME, "text.txt sha256", OTHER_TEXT),
        ("a missing val.bin", TOKENS, VAL, {VAL: remove}),
        ("a truncated token", TOKENS, "tokens/train.bin", {"tokens/train.bin": 999}),
        ("too large a token", TOKENS, f"{VAL} 11", {VAL: b"\x0b\0" * 99}),
        ("weights of other folders", f"{TOKENS} --data.weights 1 2", "=(1.0, 2.0) 1"),
        ("a weight of 0", f"{TOKENS} --data.weights 0", "weights=(0.0,)"),
        ("a weight of text", f"{TRAIN} --data.weights 1", "--data.weights text.txt"),
        ("folders of other tokenizers", f"{TOKENS} other", "DIR/other", OTHER_TOKENS),
        ("a corpus that is not prepared to the end", PREPARED, "new jaxgpt prepare",
         {"new/unfinished": lambda path: path.mkdir(parents=True)}),
        ("a truncated manifest.json", PREPARED, "new/manifest.json",
         {"new/manifest.json": "{", "new/tokenizer.json": CHARACTERS}),
        ("a missing shard", PREPARED, "new/train_000.bin",
         {"new/manifest.json": MANIFEST, "new/tokenizer.json": CHARACTERS}),
        ("a truncated shard", PREPARED, "new/train_000.bin",
         {"new/manifest.json": MANIFEST, "new/tokenizer.json": CHARACTERS,
          "new/train_000.bin": b"\0\0", "new/train_000.ends": b"\2\0\0\0"}),
        ("a broken line of JSON", f"{SMOKE} --data.path a.jsonl", "a.jsonl:1 JSON",
         {"a.jsonl": '{"text"'}),
        ("no vocabulary", TOKENS, "tokens --model.vocab-size", {META: remove}),
        ("code in meta.pkl", TOKENS, META, {META: pickle.dumps({"itos": Malicious()})}),
        ("a truncated meta.pkl", TOKENS, META, {META: 50}),
        ("a meta.pkl of words", TOKENS, META, {META: pickle.dumps({"itos": ["to"]})}),
    ],
    "Tokenizers": [
        ("an unknown character", f"{TOKENIZER} own.json", "text.txt ,.nrt", OWN),
        ("an unknown name", f"{TOKENIZER} gpt3", "gpt3"),
        ("BPE without a size", BPE, "bpe --model.vocab-size"),
        ("too small a size for BPE", f"{BPE} --model.vocab-size 256", "256 257"),
        ("too large a size for BPE", f"{BPE} --model.vocab-size 5000", "5000 267"),
        ("a size for characters", f"{TRAIN} --model.vocab-size 65", "65 11"),
        ("another kind of tokenizer", f"{TOKENIZER} {JSON}", JSON),
        ("invalid tables", f"{TOKENIZER} tables", "vocab.json merges.txt",
         {"tables/vocab.json": "{", "tables/merges.txt": ""}),
        ("a run's tokenizer, truncated", RESUME, RUN_JSON, {RUN_JSON: 30}),
        ("a run's tokenizer, replaced", GENERATE, f"{RUN_JSON} 4 11",
         {RUN_JSON: CHARACTERS}),
    ],
    "Checkpoints": [
        ("all are damaged, to resume", RESUME, STEP_8, DAMAGED),
        ("all are damaged, to sample", GENERATE, STEP_8, DAMAGED),
        ("a step that does not exist", f"{GENERATE} --checkpoint 7", "'7' 8"),
        ("their folder is missing", GENERATE, CHECKPOINTS, {CHECKPOINTS: remove}),
        ("their folder is a file", RESUME, CHECKPOINTS, {CHECKPOINTS: ""}),
        ("an incomplete one", GENERATE, STEP_8,
         {f"{STEP_8}/_CHECKPOINT_METADATA": remove}),
        ("a missing file", GENERATE, STEP_8,
         {f"{STEP_8}/params/manifest.ocdbt": remove}),
        ("of another config", GENERATE, STEP_8, {CONFIG: {"model": {"n_layer": 3}}}),
        ("parameters alone, to resume",
         "train.py --out-dir runs/imported --resume --data.path tokens", "--init-from"),
    ],
    "Starting from another run": [
        ("another model", f"{INIT_FROM} --model.n-layer 3", "--model.n-layer 3 2"),
        ("it is not a run", f"{SMOKE} --init-from runs", "runs config.json"),
        ("the same run", f"{INIT_FROM} --out-dir runs/tiny --overwrite", "--out-dir"),
        ("and resuming too", f"{INIT_FROM} --resume", "--resume --init-from"),
        ("a longer context", f"{INIT_FROM} --model.block-size 9", "block-size 9 8"),
        ("another tokenizer", f"{INIT_FROM} --data.tokenizer char", "--data.tokenizer"),
        ("a step that it does not have", f"{INIT_FROM} --checkpoint 4", "'4' 8"),
        ("text with other characters", INIT_FROM, "text.txt '!Zdsu'", OTHER_TEXT),
        ("it has no tokenizer", f"{TRAIN} --init-from runs/imported", "runs/imported"),
        ("it is damaged", INIT_FROM, STEP_8, DAMAGED),
    ],
    "Reinforcement learning": [
        ("no run to start from", "train.py ppo --reward distinct-words", "--init-from"),
        ("no reward", PPO, "--reward --reward-model"),
        ("two rewards", f"{PPO} --reward distinct-words --reward-model runs/tiny",
         "--reward --reward-model"),
        ("an unknown reward", f"{PPO} --reward kind", "'kind' distinct-words"),
        ("a reward outside a module", f"{PPO} --reward json:kind", "'json:kind'"),
        ("a reward model of another kind", f"{PPO} --reward-model runs/tiny", "=gpt"),
        ("minibatches of unequal size",
         f"{PPO} --reward distinct-words --ppo.minibatches 3", "=256 minibatches=3"),
        ("responses as long as the context",
         f"{PPO} --reward distinct-words --ppo.max-new-tokens 8", "tokens=8 size=8",
         {"a.jsonl": '{"prompt": "To"}\n'}),
        ("16 bits", f"{PPO} --model.compute-dtype bfloat16", "=bfloat16 float32"),
        ("a scale of 0", f"{PPO} --ppo.reward-std 0", "reward_std=0.0"),
        ("beta that would fall below 0",
         f"{PPO} --ppo.kl-target 6 --ppo.kl-horizon 50", "=50 batch_size=256"),
        ("its cost", f"{PPO} --reward distinct-words --dry-run", "PPO"),
        ("no prompts", "train.py ppo --init-from runs/tiny --reward tasks",
         "--data.corpus tinyshakespeare assistant"),
        ("groups of unequal size", f"{GRPO} --grpo.group-size 3", "=512 group_size=3"),
        ("a run that has not learned to answer", GRPO, "conversations"),
    ],
    "rlhf-reviews": [
        ("a repeated seed", f"{REVIEWS} --seeds 7 7", "--seeds 7"),
        ("a negative seed", f"{REVIEWS} --seeds -1", "seed=-1"),
        ("reviews that do not exist", REVIEWS, "reviews.jsonl"),
        ("a folder of other settings", REVIEWS, "new --out-dir",
         {"new/settings.json": "{}", "reviews.jsonl": ""}),
        ("a package that is not installed", REVIEWS,
         "scikit-learn requirements-rlhf.txt", {"sklearn": hide}),
    ],
    "Devices and processes": [
        ("too few devices", f"{TRAIN} --mesh.data 64", "mesh.data=64 8"),
        ("an uneven batch", f"{TRAIN} --mesh.data 2 --data.batch-size 9", "data=2"),
        ("no devices", f"{SMOKE} --mesh.data 0", "mesh.data=0"),
        ("FSDP for a lecture model", "train.py lecture-residual --mesh.fsdp 2",
         "=residual"),
        ("9 positions on 2 devices", f"{TRAIN} --model.block-size 9 --mesh.tensor 2",
         "size=9"),
        ("36 channels on 8 devices", f"{TRAIN} --model.n-embd 36 --mesh.fsdp 8",
         "fsdp=8"),
        ("data parallelism for sampling", f"{GENERATE} --mesh.data 2", "mesh.data=2"),
        ("no address", f"{SMOKE} --process-id 0", "--coordinator-address"),
        ("a negative process", f"{DISTRIBUTED} -1 {ADDRESS}", "--process-id -1"),
        ("no port", f"{DISTRIBUTED} 0 --coordinator-address host", "HOST:PORT"),
    ],
    "Plans": [
        ("a missing text", f"{SMOKE} --dry-run --data.path tex.txt", "tex.txt"),
        ("an unknown topology", f"{SMOKE} --plan v99:2x2", "'v99:2x2' v5e:2x4"),
        ("too few devices", f"{SMOKE} --plan v5e:1x1 --mesh.data 2", "mesh.data=2 1"),
        ("a model that does not fit",
         f"{SMOKE} --plan v5e:1x1 --model.block-size 8192 --model.n-head 64",
         "v5e:1x1 --mesh.fsdp --model.remat"),
    ],
    "generate.py": [
        ("an unknown character", f"{GENERATE} --prompt ROMEO:", "'R' 0 11"),
        ("no run", "generate.py", "--run-dir"),
        ("a classifier", "generate.py --run-dir runs/classifier", "=classifier"),
        ("not a run", "generate.py --run-dir runs", "runs config.json"),
        ("no tokenizer", "generate.py --run-dir runs/imported", "--meta"),
        ("a missing file", f"{GENERATE} --prompt FILE:prompt.txt", "prompt.txt"),
        ("a folder for a file", f"{GENERATE} --prompt FILE:tokens", "tokens"),
        ("a prompt that is not UTF-8", f"{GENERATE} --prompt FILE:p.txt", "p.txt",
         {"p.txt": b"\xff"}),
        ("no tokens", f"{GENERATE} --max-new-tokens 0", "max_new_tokens=0"),
        ("no samples", f"{GENERATE} --num-samples 0", "num_samples=0"),
        ("the best of some without a reward model", f"{GENERATE} --best-of 4",
         "--reward-model"),
        ("a reward model that is a GPT",
         f"{GENERATE} --best-of 4 --reward-model runs/tiny", "architecture=gpt"),
        ("a temperature of nan", f"{GENERATE} --temperature nan", "temperature=nan"),
        ("a negative temperature", f"{GENERATE} --temperature -1", "temperature=-1"),
        ("a top-k of 0", f"{GENERATE} --top-k 0", "top_k=0"),
        ("a top-k above the vocabulary", f"{GENERATE} --top-k 12", "top_k=12 =11"),
        ("a top-p of 0", f"{GENERATE} --top-p 0", "top_p=0"),
        ("a top-p above 1", f"{GENERATE} --top-p 1.5", "top_p=1.5"),
        ("a stop text with an unknown character", f"{GENERATE} --stop '!'", "'!' 11"),
        ("a negative seed", f"{GENERATE} --seed -1", "seed=-1"),
    ],
    "classify": [
        ("a language model", "-m jaxgpt classify --run-dir runs/tiny To",
         "=gpt generate.py"),
        ("not a run", "-m jaxgpt classify --run-dir runs To", "runs config.json"),
        ("no tokenizer", f"{CLASSIFY} Lear", "tokenizer.json",
         {"runs/classifier/tokenizer.json": remove}),
    ],
    "translate": [
        ("a language model", "-m jaxgpt translate --run-dir runs/tiny To",
         "=gpt generate.py"),
        ("not a run", "-m jaxgpt translate --run-dir runs To", "runs config.json"),
        ("no beams", f"{TRANSLATE} Lear --beams 0", "beams=0"),
        ("a negative penalty", f"{TRANSLATE} Lear --length-penalty -1", "penalty=-1.0"),
        ("no tokenizer", f"{TRANSLATE} Lear", "tokenizer.json",
         {"runs/seq2seq/tokenizer.json": remove}),
    ],
    "chat": [
        ("a run without the tokens of conversations",
         "-m jaxgpt chat --run-dir runs/tiny", "<|end|> chat-sft"),
        ("no run", "-m jaxgpt chat --run-dir runs", "runs config.json"),
        ("a classifier", "-m jaxgpt chat --run-dir runs/classifier", "jaxgpt classify"),
        ("no tokenizer", CHATTING, "tokenizer.json",
         {"runs/chat/tokenizer.json": remove}),
        ("an empty system message", f"{CHATTING} --system ' '", "--system"),
        ("no tokens", f"{CHATTING} --max-new-tokens 0", "max_new_tokens=0"),
        ("a top-k above the vocabulary", f"{CHATTING} --top-k 99", "top_k=99 =38"),
        ("a negative seed", f"{CHATTING} --seed -1", "seed=-1"),
    ],
    "evaluate, attention, compare, lecture": [
        ("a stride of 0", f"{EVALUATE} --stride 0", "stride=0"),
        ("a stride above the block size", f"{EVALUATE} --stride 9", "stride=9 =8"),
        ("an unknown command", "-m jaxgpt evalute", "evalute"),
        ("an unknown split", f"{EVALUATE} --split va", "--split 'va' 'val' 'all'"),
        ("the test split of a text", f"{EVALUATE} --split test", "test val"),
        ("beams for a language model", f"{EVALUATE} --beams 2", "--beams =gpt"),
        ("a stride for a classifier", f"{CLASSIFIER} --stride 2", "2 =classifier"),
        ("labels that a classifier does not know", f"{CLASSIFIER} --data-path a.csv",
         "'maybe' 'perhaps'", {"a.csv": "text,label\nLear,maybe\n"}),
        ("text that does not exist", f"{EVALUATE} --data-path tex.txt", "tex.txt"),
        ("other characters", f"{EVALUATE} --data-path text.txt", "'!Zdsu'", OTHER_TEXT),
        ("documents for a model without an end token",
         f"{EVALUATE} --data-path a.jsonl", "a.jsonl <|endoftext|>",
         {"a.jsonl": '{"text": "To be"}'}),
        ("a single character", f"{EVALUATE} --data-path text.txt", "1 tokens",
         {"text.txt": "T"}),
        ("text for a run without a tokenizer",
         "-m jaxgpt evaluate --run-dir runs/imported --data-path text.txt",
         "tokenizer.json --meta"),
        ("attention to an empty prompt", f"{ATTENTION} --prompt ''", "--prompt"),
        ("a target of a GPT", f"{ATTENTION} --prompt To --target be", "--target gpt"),
        ("a missing folder", f"{ATTENTION} --prompt To --out no/maps.png", "maps.png"),
        ("no attention", "-m jaxgpt attention --run-dir runs/bigram --prompt To",
         "bigram"),
        ("two models", f"{COMPARE} --hf gpt2 --nanogpt ckpt.pt", "--hf --nanogpt"),
        ("a checkpoint of no run", f"{COMPARE} --checkpoint 8", "--run-dir"),
        ("comparing a missing file", f"{COMPARE} --nanogpt no.pt", "no.pt"),
        ("comparing a lecture model", f"{COMPARE} --run-dir runs/bigram", "bigram"),
        ("too long a text", f"{COMPARE} --run-dir runs/tiny --length 9", "length=9 =8"),
        ("comparing empty rows", f"{COMPARE} --length 0", "length=0"),
        ("comparing an empty batch", f"{COMPARE} --batch-size 0", "batch_size=0"),
        ("too many steps", f"{LECTURE} --steps-scale inf", "--steps-scale inf"),
        ("no seeds", f"{LECTURE} --seeds", "--seeds"),
        ("a lecture of no steps", f"{LECTURE} --steps-scale 0", "--steps-scale 0"),
        ("a negative seed for the lecture", f"{LECTURE} --seeds -1", "seed=-1"),
        ("a repeated seed", f"{LECTURE} --seeds 7 7", "--seeds 7,"),
        ("a file for a folder", f"{LECTURE} --out-dir text.txt", "text.txt"),
    ],
    "prepare": [
        ("a broken line", f"{PREPARE} a.jsonl", "a.jsonl:2 JSON --on-error",
         {"a.jsonl": '{"text": "a"}\n{"text": "b"\n'}),
        ("a line that is not UTF-8", f"{PREPARE} a.jsonl", "a.jsonl:1 UTF-8",
         {"a.jsonl": b'{"text": "\xe9"}'}),
        ("a line without the field", f"{PREPARE} a.jsonl", "a.jsonl:1 'text' body",
         {"a.jsonl": '{"body": "a"}'}),
        ("a field without text", f"{PREPARE} a.jsonl", "a.jsonl:1 null",
         {"a.jsonl": '{"text": null}'}),
        ("an empty document", f"{PREPARE} text.txt", "text.txt", {"text.txt": ""}),
        ("a truncated .gz file", f"{PREPARE} a.jsonl.gz", "a.jsonl.gz runcated",
         {"a.jsonl.gz": gzip.compress(b'{"text": "a"}\n')[:-4]}),
        ("a truncated .parquet file", f"{PREPARE} a.parquet", "a.parquet",
         {"a.parquet": b"PAR1"}),
        ("a table as text", f"{PREPARE} a.csv", "a.csv JSONL", {"a.csv": "text\na\n"}),
        ("no input", PREPARE, "input *.jsonl"),
        ("a file that does not exist", f"{PREPARE} tex.txt", "tex.txt *.jsonl"),
        ("a folder without documents", f"{PREPARE} gpt2", "DIR/gpt2 *.jsonl"),
        ("no document that can be used", f"{PREPARE} text.txt --on-error skip",
         "no document", {"text.txt": ""}),
        ("a val-fraction of 1", f"{PREPARE} text.txt --val-fraction 1", "fraction 1"),
        ("shards of no tokens", f"{PREPARE} text.txt --shard-tokens 0", "tokens 0"),
        ("no workers", f"{PREPARE} text.txt --workers 0", "--workers 0"),
        ("BPE without a size", f"{PREPARE} text.txt --tokenizer bpe", "--vocab-size"),
        ("too large a size", f"{PREPARE} text.txt --tokenizer bpe --vocab-size 5000",
         "5000 267"),
        ("a size that no vocabulary has",
         f"{PREPARE} text.txt --tokenizer bpe --vocab-size {10**20}", f"{10**20} 257"),
        ("a size for characters", f"{PREPARE} text.txt --vocab-size 65", "65 char"),
        ("a tokenizer without an end", f"{PREPARE} text.txt --tokenizer own.json",
         "own.json special", OWN),
        ("an unknown character", f"{PREPARE} text.txt --tokenizer own.json",
         "text.txt ','", {"own.json": CharTokenizer("Tobe ", [END_OF_TEXT]).to_json()}),
        ("a directory of other files", f"{PREPARE} text.txt --out-dir tokens",
         "tokens"),
        ("a file for a directory", f"{PREPARE} text.txt --out-dir ckpt.pt", "ckpt.pt"),
    ],
    "import and export": [
        ("code in ckpt.pt", CKPT, "ckpt.pt", {"ckpt.pt": torch_file(Malicious())}),
        ("an unknown format", f"{IMPORT} llama ckpt.pt runs/new", "'llama' 'nanogpt'"),
        ("a weight that is NaN", CKPT, "wpe.weight NaN", {"ckpt.pt": with_nan}),
        ("a missing file", f"{IMPORT} nanogpt no.pt runs/new", "no.pt"),
        ("a truncated checkpoint", CKPT, "ckpt.pt", {"ckpt.pt": 5000}),
        ("another checkpoint", CKPT, "model_args",
         {"ckpt.pt": torch_file({"epoch": 3})}),
        ("a file for a folder", f"{IMPORT} huggingface ckpt.pt runs/new", "ckpt.pt"),
        ("another model type", GPT2, "=llama", {GPT2_CONFIG: {"model_type": "llama"}}),
        ("other shapes", GPT2, "wpe 16", {GPT2_CONFIG: {"n_positions": 16}}),
        ("truncated weights", GPT2, "gpt2", {"gpt2/model.safetensors": 9999}),
        ("no weights", GPT2, "safetensors", {"gpt2/model.safetensors": remove}),
        ("a truncated tokenizer", GPT2, JSON, {JSON: 99}),
        ("a tokenizer of another size", f"{CKPT} --tokenizer own.json", "4 11", OWN),
        ("two tokenizers", f"{CKPT} --meta {META} --tokenizer gpt2", "--meta"),
        ("over a run", f"{IMPORT} nanogpt ckpt.pt runs/tiny", "runs/tiny --overwrite"),
        ("over other files", f"{IMPORT} nanogpt ckpt.pt tokens --overwrite", "tokens"),
        ("exporting no run", f"{EXPORT} nanogpt runs new.pt", "runs config.json"),
        ("a bigram as GPT-2", f"{EXPORT} huggingface runs/bigram new", "bigram"),
        ("a bigram as nanoGPT", f"{EXPORT} nanogpt runs/bigram new.pt", "bigram"),
        ("over ckpt.pt", f"{EXPORT} nanogpt runs/tiny ckpt.pt", "ckpt.pt --overwrite"),
        ("over a folder", f"{EXPORT} nanogpt runs/tiny tokens --overwrite", "tokens"),
        ("over a meta.pkl", f"{EXPORT} nanogpt runs/tiny tokens/new.pt", META),
        ("over files of a folder", f"{TO_GPT2} gpt2", "gpt2 --overwrite"),
        ("exporting over a run", f"{TO_GPT2} runs/bigram --overwrite", "runs/bigram"),
        ("exporting over a file", f"{TO_GPT2} text.txt --overwrite", "text.txt"),
        ("below a file", f"{EXPORT} nanogpt runs/tiny text.txt/new.pt", "text.txt"),
        ("a flag of nanoGPT's", f"{TO_GPT2} new --dataset tiny", "--dataset"),
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def shelf(tiny_run, untrained, bigram, tmp_path_factory):
    """The directory that the page's introduction describes; it is only copied."""
    here = tmp_path_factory.mktemp("shelf")
    tiny = here / "runs" / "tiny"
    shutil.copytree(tiny_run, tiny, ignore=shutil.ignore_patterns("*.png"))
    for kind in ("chat", "classifier", "seq2seq"):
        shutil.copytree(untrained / kind, here / "runs" / kind)
    change(tiny / "config.json", {"data": {"path": ["text.txt"]}})
    (here / "text.txt").write_text("To be, or not to be.\n" * 40)
    config, state, _ = load_state(tiny)
    tokenizer = load_run(tiny).tokenizer
    ids = tokenizer.encode((here / "text.txt").read_text()).astype(np.uint16)
    (here / "tokens").mkdir()
    ids[:756].tofile(here / "tokens" / "train.bin")
    ids[756:].tofile(here / "tokens" / "val.bin")
    save_nanogpt_meta(here / META, tokenizer)
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
    return here


@pytest.fixture(scope="module")
def rows():
    """Collects the rows of the page, and writes the page if asked to."""
    rows = {}
    yield rows
    if os.environ.get("JAXGPT_WRITE_TABLE") == "1":
        page = PAGE.read_text(encoding="utf-8").split("\n## ")[0]  # its introduction
        for group, cases in CASES.items():
            page += f"\n## {group}\n\n| mistake | command | exit | message |\n"
            page += "|---|---|---|---|\n"
            page += "".join(rows[group, mistake] for mistake, *_ in cases)
        PAGE.write_text(page, encoding="utf-8")


def files(here):
    """All files but locks, the cache, and what `prepare` can go on from."""
    found = contents(here).items()
    left = re.compile(r"cache/.*|.*/unfinished/.*|.*lock")
    return {path: content for path, content in found if not left.fullmatch(path)}


def message_of(status, err, here):
    """The error message on one line, without what differs at each run."""
    if status == 2:  # a box with a title, from the parser of the command line
        err = re.sub(r"^╭─ (.*?) ─+╮$", r"\1\n-", err, flags=re.MULTILINE)
        message = re.split(r"\n[\s│─╰╯-]+(?:\n|$)", err)[1].replace("│", "")
    else:
        message = re.search(r"^error: (.+)\Z", err, re.MULTILINE | re.DOTALL)[1]
    message = " ".join(message.replace(str(here), "DIR").split())
    digests, temporary_names = r"\b([0-9a-f]{32}){1,2}\b", r"[0-9a-f]{8}-\d+(?=\.tmp)"
    return re.sub(f"{digests}|{temporary_names}", "...", message)


# The first case of each group, and these, which protect files or have no other test.
DEFAULT = {"over ckpt.pt", "over files of a folder", "exporting over a run"}
DEFAULT |= {"the run's text has changed", "their folder is missing"}
DEFAULT |= {"a top-p of 0", "no samples"}


@pytest.mark.parametrize(
    ("group", "case"),
    [
        pytest.param(
            group,
            case,
            id=f"{group}: {case[0]}",
            marks=pytest.mark.messages if n and case[0] not in DEFAULT else (),
        )
        for group, cases in CASES.items()
        for n, case in enumerate(cases)
    ],
)
def test_bad_input_ends_in_an_error_that_names_it_and_changes_no_file(
    group, case, shelf, rows, tmp_path, monkeypatch, capsys
):
    mistake, command, names, *changes = case
    if "--plan" in command:
        pytest.importorskip("libtpu")  # for Linux on x86-64 only
    here = shutil.copytree(shelf, tmp_path / "here")
    monkeypatch.chdir(here)
    held = [change(Path(path), new) for path, new in dict(*changes).items()]
    before = files(here)

    script, *arguments = shlex.split(command)
    if script == "-m":
        script, *arguments = "jaxgpt/__main__.py", *arguments[1:]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(start, "start", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("JAXGPT_CACHE", "cache")
    monkeypatch.setenv("COLUMNS", "1000")  # of the boxes, so that no line is broken
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # does not look for other processes
    monkeypatch.delenv("JAXGPT_TRACEBACK", raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out, err = capsys.readouterr()
    for file in filter(None, held):
        file.close()

    assert stopped.value.code in (1, 2)
    assert "Traceback" not in err
    assert out == "" or "--plan" in command
    assert files(here) == before
    message = message_of(stopped.value.code, err, here)
    for name in names.split():
        assert name in message
    cells = (mistake, f"`python {command}`", str(stopped.value.code), message)
    row = " | ".join(cell.replace("|", "\\|") for cell in cells)
    rows[group, mistake] = f"| {row} |\n"
