"""Fuzzing of what reads foreign files: each ends in a result or an error of jaxgpt.

Each reader gets 100 files, or 10,000 with `pytest --full tests/reliability`.
"""

import io
import json
import math
import os
import pickle
import shutil
import struct
import sys
import traceback
import warnings
import zipfile
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch_nanogpt
from conftest import ROOT, TEXT, TINY, changed, init_model
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save

import generate
from jaxgpt import BPETokenizer, CharTokenizer, Run
from jaxgpt.interop import huggingface, state_dict
from jaxgpt.interop.nanogpt import read_nanogpt
from jaxgpt.run import load_config
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.pretrained import load_nanogpt_meta, save_nanogpt_meta, tokenizer_in
from jaxgpt.text.shards import open_folder
from jaxgpt.text.tokenizer import load_tokenizer

OURS = (str(ROOT / "jaxgpt"), str(ROOT / "generate.py"))
CHARACTERS = CharTokenizer("\nabcdefghij")
BPE = BPETokenizer.train([TEXT], 300)
MODEL = json.loads(BPE.to_json())["model"]
MERGES = "\n".join(["#version: 0.2", *map(" ".join, MODEL["merges"])]).encode()
META = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
WEIGHTS = "model.safetensors"
CALLED = []  # by pickles: the arguments of `never`
TEXTS = st.text() | st.text(st.sampled_from("ab <|endoftext|>\n\ud800\udfff\x00é🙂"))
ASCII = TEXTS.map(ascii).map(str.encode)

# JSON that json.dumps can't write, by the string that stands for it.
WRITTEN = {
    "@deep": "[" * 400 + "]" * 400,
    "@deeper": '{"a":' * 990 + "1" + "}" * 990,
    "@deepest": "[" * 20_000,
    "@infinity": "1e999",
    "@digits": "9" * 5000,
}
# fmt: off
ODD = st.sampled_from([
    None, True, False, 0, 1, -1, 7, 2**31 - 1, 2**32 - 1, 10**12, 2**63, 10**400,
    0.5, 1e-320, 1e300, math.inf, -math.inf, math.nan,
    "", "a", "0", "\ud800", "\0", "../up", "x" * 1000, *WRITTEN,
    [], {}, [[]], [0], {"": None}, {"0": 0},
])
# fmt: on
VALUES = ODD | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
CHANCE, BYTES = st.integers(0, 9), st.binary(max_size=8)


@st.composite
def edited(draw, document, values=VALUES):
    """The document with nodes replaced, removed and added, or another altogether.

    A value that is a function is called with what it replaces.
    """

    def edit(node):
        if not (isinstance(node, dict | list) and node and draw(CHANCE)):
            value = draw(values)
            return value(node) if callable(value) else value
        items = dict(node if isinstance(node, dict) else enumerate(node))
        key = draw(st.sampled_from(list(items)))
        change = draw(CHANCE)
        if change == 9:
            del items[key]
        else:
            key = draw(st.text(max_size=3)) if change == 8 else key
            items[key] = edit(items.get(key))
        return items if isinstance(node, dict) else list(items.values())

    for _ in range(draw(st.integers(1, 3))):
        document = edit(document)
    return document


@st.composite
def damaged(draw, content, pieces=BYTES):
    """The bytes, of which some are cut, flipped, repeated, overwritten or inserted."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.just(0) | st.integers(0, 40))
        piece = content[start:stop]
        flipped = bytes(byte ^ 0x20 for byte in piece)
        others = [b"", piece * 2, bytes(len(piece)), b"\xff" * len(piece), flipped]
        content[start:stop] = draw(st.sampled_from(others) | pieces)
        if draw(CHANCE) == 9:
            del content[start:]
    return bytes(content)


def as_json(document):
    text = json.dumps(document)
    for name, written in WRITTEN.items():
        text = text.replace(json.dumps(name), written)
    return text.encode()


def resized(settings):
    """A model's settings with sizes that no memory holds."""
    names = {"n_layer", "n_head", "n_embd", "block_size", "n_positions", "vocab_size"}
    sizes = st.sampled_from([1, 2, 7, 2**31 - 1, 2**32, 10**12 + 39, 2**63])
    optional = dict.fromkeys(sorted(names & settings.keys()), sizes)
    return st.fixed_dictionaries({}, optional=optional).map(lambda new: settings | new)


def json_files(document):
    """Contents of a file that should hold the document."""
    changed = edited(document).map(as_json) | damaged(as_json(document))
    return changed | st.binary(max_size=100)


def outcome(read, path=None):
    """What `read()` returns, or None if it raises an error that names the path.

    The error must come from jaxgpt, not from a library.
    """
    try:
        return read()
    except (ValueError, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        frames = traceback.extract_tb(error.__traceback__)
        ours = named or frames[-1].filename.startswith(OURS)
        ours = ours and not isinstance(error, UnicodeError)  # str.encode has no frame
        if not ours or str(path or "") not in str(error):
            raise
    finally:
        assert not CALLED


def put(path, content):
    """Writes and returns a new file: the one before may still be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where the files are; each model is traced once, and `os.system` is harmless."""
    folder = tmp_path_factory.mktemp("foreign")
    shapes = cache(state_dict.parameter_shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXGPT_CACHE", str(folder / "cache"))
        patch.setattr(state_dict, "parameter_shapes", shapes)
        patch.setattr(os, "system", never)
        yield folder


def use(tokenizer, text):
    """Encodes and decodes with a tokenizer, if it could be read."""
    if tokenizer is None:
        return
    for encode in (tokenizer.encode, tokenizer.encode_prompt):
        ids = outcome(lambda encode=encode: encode(text))
        if ids is not None:
            assert ids.dtype == np.int32
            assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
            assert isinstance(tokenizer.decode(ids), str)
    assert len(tokenizer.decode_bytes(range(min(tokenizer.vocab_size, 500))))


@given(st.data(), TEXTS)
@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["char", "bpe"])
def test_any_tokenizer_json_is_read_or_refused(folder, tokenizer, data, text):
    content = data.draw(json_files(json.loads(tokenizer.to_json())))
    path = put(folder / "tokenizer.json", content)
    use(outcome(lambda: load_tokenizer(path), path), text)
    use(outcome(lambda: huggingface.read_tokenizer(folder), path), text)


@given(
    st.just(as_json(MODEL["vocab"])) | json_files(MODEL["vocab"]),
    st.just(MERGES) | damaged(MERGES) | ASCII,
    TEXTS,
)
def test_any_tables_of_bpe_are_read_or_refused(folder, vocab, merges, text):
    tables = folder / "tables"
    tables.mkdir(exist_ok=True)
    path = put(tables / "vocab.json", vocab)
    put(tables / "merges.txt", merges)
    use(outcome(lambda: tokenizer_in(tables), path), text)


SIZED = resized(TINY.to_dict()["model"]).map(lambda model: as_json({"model": model}))


@given(json_files(TINY.to_dict()) | SIZED)
def test_any_config_of_a_run_is_read_or_refused(folder, content):
    path = put(folder / "config.json", content)
    outcome(lambda: load_config(folder), path)


def never(*args):
    """The function that pickles ask for and no reader may call."""
    CALLED.append(args)


class Calling(tuple):
    """Pickles as a call."""

    def __reduce__(self):
        return tuple(self)


def in_itself(old):
    box = [old]
    box.append(box)
    return box


# fmt: off
CALLS = st.sampled_from([
    (never, ()), (never, ("itos",)), (bytearray, (10**6,)), (list, (), {"state": 1}),
    (getattr, (never, "__globals__")),
]).map(Calling)
PICKLED = VALUES | CALLS | st.sampled_from([
    in_itself, lambda old: len, lambda old: dict,
    {1, 2}, (1, ("a",)), b"bytes", bytearray(b"a"), 1j,
    ["a", "b"], {0: "a", 1: "b"}, {0: "a", 2: "b"}, {0: b"a"}, {0: ["a"]},
])
NAME = __name__.encode()
# Parts of pickles; a sequence of them is rarely a valid one.
OPCODES = st.sampled_from([
    *(bytes([code]) for code in b"}])(012N.\x88Rb\x81\x92osuaetd\x85\x93Q\x94"),
    b"\x80\x02", b"\x80\x04", b"K\0", b"K\1", b"X\4\0\0\0itos", b"X\1\0\0\0a",
    b"c" + NAME + b"\nnever\n", b"i" + NAME + b"\nnever\n", b"cos\nsystem\n",
    b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n",
    b"ctorch\nFloatStorage\n", b"ctorch\nfloat32\n", *(
        b"ctorch._utils\n_rebuild_" + kind
        for kind in (b"tensor_v2\n", b"parameter\n", b"meta_tensor_no_storage\n")
    ),
    b"Pid\n", b"q\0", b"h\0", b"r\xff\xff\xff\xff", b"p9999999999\n", b"\x82\1",
    b"L9\n", b"I1\n", b"\x8b\xff\xff\xff\x7f", b"\x8e" + struct.pack("<Q", 2**62),
    *(code + struct.pack("<Q", 2**40) for code in (b"\x95", b"\x96")),
])
# fmt: on
SEQUENCES = st.lists(OPCODES, max_size=20).map(lambda codes: b"".join(codes) + b".")


@given(
    st.builds(pickle.dumps, edited(META, PICKLED), st.sampled_from([0, 2, 4, 5]))
    | damaged(pickle.dumps(META, protocol=4), SEQUENCES)
)
@example(b"(i" + NAME + b"\nnever\n.")  # calls `never`
@example(b"\x80\x04}r\xff\xff\xff\xff.")  # would take all memory
@example(b"}p999999999\n.")  # the same
@example(b"}K\x01" + b"2\x86" * 60 + b"Ns.")  # would take forever to hash
def test_any_meta_pkl_is_read_or_refused_and_never_run(folder, content):
    path = put(folder / "meta.pkl", content)
    use(outcome(lambda: load_nanogpt_meta(path), path), "ab")


@pytest.fixture(scope="module")
def checkpoint(folder):
    """nanoGPT's ckpt.pt, as its bytes and as its content."""
    path = folder / "valid.pt"
    torch_nanogpt.make(path, bias=False)
    return path.read_bytes(), torch.load(path)


# fmt: off
DENSE = st.sampled_from([
    lambda old: old[:0], lambda old: old[None], lambda old: old.flatten()[:1].squeeze(),
    lambda old: old.reshape(old.shape[::-1]),
    lambda old: old.double() * 1e300, lambda old: old * math.nan,
    *(partial(torch.Tensor.to, dtype=dtype) for dtype in (
        torch.half, torch.bfloat16, torch.float8_e4m3fn, torch.int, torch.bool,
        torch.complex64,
    )),
])
OTHERS = st.sampled_from([
    lambda old: old.flatten()[:1].expand(10**6, 10**6),
    lambda old: old.flatten()[:1].expand(old.shape),
    lambda old: torch.empty(10**6, 10**6, device="meta"), lambda old: old.to("meta"),
    lambda old: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.qint8),
    lambda old: old.to_sparse(), torch.nn.Parameter, lambda old: old._neg_view(),
])
# fmt: on


def odd_tensor(change, old):
    """Changes a tensor; uses another one unless `old` is an unchanged tensor."""
    plain = isinstance(old, torch.Tensor) and old.dtype == torch.float32
    plain = plain and old.is_contiguous() and old.device.type == "cpu"
    plain = plain and old.dim() and len(old)
    with warnings.catch_warnings(action="ignore"):  # some types are deprecated
        return change(old if plain else torch.ones(2, 2))


TENSORS = (DENSE | OTHERS).map(lambda change: partial(odd_tensor, change))


def saved(document):
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save(document, file)
    return file.getvalue()


@st.composite
def in_zip(draw, zipped):
    """A checkpoint with valid tensors and a broken pickle."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zipped)) as old, zipfile.ZipFile(new, "w") as file:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = draw(damaged(content, SEQUENCES))
            file.writestr(name, content)
    return new.getvalue()


@given(st.data())
def test_any_checkpoint_of_nanogpt_is_read_or_refused_and_never_run(
    folder, checkpoint, data
):
    whole, document = checkpoint
    models = resized(document["model_args"])
    sized = models.map(lambda model: document | {"model_args": model})
    others = (edited(document, values) for values in (CALLS, PICKLED | TENSORS))
    saves = [each.map(saved) for each in (sized, *others)]
    content = data.draw(st.one_of(*saves, damaged(whole), in_zip(whole)))
    path = put(folder / "ckpt.pt", content)
    outcome(lambda: read_nanogpt(path, lambda line: None), path)


@pytest.fixture(scope="module")
def exported(folder):
    """A directory with a GPT-2 in Hugging Face's format."""
    model, params = init_model(vocab_size=BPE.vocab_size, bias=True)
    huggingface.write_huggingface(folder / "gpt2", model.config, params, BPE)
    return folder / "gpt2"


@st.composite
def safetensors(draw, content):
    """Files of safetensors whose header contradicts the data."""
    (length,) = struct.unpack("<Q", content[:8])
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    dtypes = st.sampled_from(["F64", "BF16", "C64", "F8_E4M3", "BOOL", "F4", "X"])
    text = as_json(draw(st.just(header) | edited(header, VALUES | dtypes)))
    text = draw(st.sampled_from([text, text[:-1] + b"," + text[1:], text + b"  "]))
    lengths = st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
    length = draw(st.just(len(text)) | lengths | st.integers(0, len(content)))
    tensors = draw(st.just(tensors) | st.sampled_from([b"", tensors[:-4], tensors * 2]))
    return struct.pack("<Q", length) + text + tensors


@st.composite
def retyped(draw, content):
    """Valid files of safetensors, with tensors of other types and shapes."""
    tensors = load(content)
    for name in sorted(draw(st.sets(st.sampled_from(list(tensors)), min_size=1))):
        tensors[name] = odd_tensor(draw(DENSE), tensors[name]).contiguous()
    return save(tensors)


@given(st.data())
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, f"{WEIGHTS}.index.json"])
def test_any_directory_of_hugging_face_is_read_or_refused(folder, exported, name, data):
    model = folder / "changed"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(exported, model)
    if name == WEIGHTS:
        old = (model / name).read_bytes()
        files = safetensors(old) | damaged(old) | st.binary() | retyped(old)
    elif name == "config.json":
        document = json.loads((model / name).read_text())
        files = json_files(document) | resized(document).map(as_json)
    else:
        shard = (model / WEIGHTS).rename(model / "a.safetensors")
        index = dict.fromkeys(load(shard.read_bytes()), shard.name)
        files = json_files({"weight_map": index})
    put(model / name, data.draw(files))
    outcome(lambda: huggingface.read_huggingface(model), model)


SIZES = st.sampled_from([None, 1, 11, 65, 300, 65_537])
NAMES = st.sampled_from(["char", "bpe", "nowhere"])
TRAIN = damaged(bytes(range(0, 11)) * 40) | st.binary()
VAL = damaged(bytes(2 * [3, 0]) * 40) | st.binary()


@given(TRAIN, VAL, SIZES, NAMES, st.booleans())
def test_any_token_files_are_read_or_refused(
    folder, train, val, vocab_size, tokenizer, has_meta
):
    tokens = folder / "tokens"
    tokens.mkdir(exist_ok=True)
    put(tokens / "train.bin", train)
    put(tokens / "val.bin", val)
    save_nanogpt_meta(tokens / "meta.pkl", CHARACTERS)
    if not has_meta:
        (tokens / "meta.pkl").unlink()
    corpus_of(tokens, vocab_size, tokenizer)


SHARD = {"tokens": 4, "documents": 1, "largest_token": 10, "sha256": "0"}
MANIFEST = {"format": 1, "settings": {}, "tokenizer": "0", "vocab_size": 11}
MANIFEST |= {"end_of_text": 10, "sources": [], "documents": 2, "duplicates": 0}
MANIFEST |= {"shards": [{"name": f"{s}_000.bin"} | SHARD for s in ("train", "val")]}


@given(json_files(MANIFEST))
@example(as_json(MANIFEST))
def test_any_manifest_of_shards_is_read_or_refused(folder, manifest):
    prepared = folder / "prepared"
    prepared.mkdir(exist_ok=True)
    for split in ("train", "val"):
        np.arange(7, 11, dtype="<u2").tofile(prepared / f"{split}_000.bin")
        np.array([4], "<u4").tofile(prepared / f"{split}_000.ends")
    put(prepared / "manifest.json", manifest)
    found = outcome(lambda: open_folder(prepared, 11), prepared)
    assert found or manifest != as_json(MANIFEST)
    for tokens in found[0].values() if found else ():
        assert tokens[:].tolist() in ([7, 8, 9, 10], [])


def corpus_of(path, vocab_size, tokenizer):
    """Loads a corpus, whose tokens must all be in its vocabulary."""
    if tokenizer == "bpe" and vocab_size is None:
        vocab_size = 257
    data = {"path": (str(path),), "tokenizer": tokenizer}
    config = changed(TINY, model={"vocab_size": vocab_size}, data=data)
    if found := outcome(lambda: load_corpus(config, log=lambda line: None)):
        corpus, config = found
        for split in (corpus.train, corpus.val):
            ids = split[:]
            assert ids.max() < config.model.vocab_size
            if corpus.tokenizer:
                assert isinstance(corpus.tokenizer.decode(ids.tolist()), str)


@given(damaged(TEXT.encode()) | st.binary() | ASCII, SIZES, NAMES)
def test_any_text_file_is_read_or_refused(folder, content, vocab_size, tokenizer):
    corpus_of(put(folder / "text.txt", content), vocab_size, tokenizer)
    shutil.rmtree(folder / "cache", ignore_errors=True)


# Two of the same size, so that their models share compiled programs, and a larger one.
KINDS = {"char": CHARACTERS, "odd": CharTokenizer("a\ud800\x00\n<|>é🙂bc"), "bpe": BPE}


@cache
def untrained(kind):
    """A run with initial parameters."""
    tokenizer, sizes = KINDS[kind], {"vocab_size": KINDS[kind].vocab_size}
    return Run(changed(TINY, model=sizes), tokenizer, *init_model(**sizes), 0)


PROMPTS = TEXTS | st.text("abcdefghij\n") | st.text("a\ud800é<|>").map("FILE:".__add__)


@given(PROMPTS, PROMPTS | st.just(""))
@pytest.mark.parametrize("kind", KINDS)
def test_any_prompt_is_continued_in_utf8_or_refused(kind, prompt, stop):
    options = {"prompt": prompt, "stop": stop, "max_new_tokens": 1, "num_samples": 2}
    arguments, run = generate.Arguments(ROOT, **options), untrained(kind)
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.tyro, "cli", lambda *args, **kwargs: arguments)
        patch.setattr(generate, "load_config", lambda run_dir: run.config)
        patch.setattr(generate, "load_run", lambda *args: run)
        patch.setattr(generate.start, "start", generate.start.encode_output)
        patch.setattr(sys, "stdout", stdout)
        outcome(generate.main)
    stdout.flush()
    stdout.buffer.getvalue().decode()  # raises if it is not UTF-8
