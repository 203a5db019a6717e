import json
import re
import shutil
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_gpt2
from conftest import TEXT, finish, start_script
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

from jaxgpt import BPETokenizer, CharTokenizer, GPTConfig, load_run
from jaxgpt.interop import huggingface
from jaxgpt.interop.huggingface import (
    read_huggingface,
    read_tokenizer,
    write_huggingface,
)
from jaxgpt.models import build_model
from jaxgpt.text import fetch, tokenizer
from jaxgpt.text.pretrained import gpt2_tokenizer

TOKENS = np.random.default_rng(0).integers(300, size=(2, 16))
SMALL = GPTConfig(block_size=16, vocab_size=300, n_layer=2, n_head=2, n_embd=16)
WTE, MLP = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"


def small(**fields):
    return GPTConfig(**vars(SMALL) | fields)


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 300)


@pytest.fixture
def folder(tmp_path, make_once):
    """A directory that transformers has saved."""
    made = make_once("gpt2", torch_gpt2.make)
    return shutil.copytree(made, tmp_path / "gpt2")


@pytest.fixture
def shards(tmp_path, make_once):
    """The same model with its weights in several files."""
    made = make_once("shards", partial(torch_gpt2.make, max_shard_size="10KB"))
    return shutil.copytree(made, tmp_path / "shards")


def our_logits(config, params, tokens=TOKENS):
    return jax.jit(build_model(config, "cpu").apply)({"params": params}, tokens)


def their_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def random_params(config):
    """Parameters none of which is 0 or 1."""
    init, rng = build_model(config, "cpu").init, np.random.default_rng(0)
    params = jax.jit(init)(jax.random.key(0), TOKENS[:, :1])["params"]
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, "f4"), params)


def assert_same_weights(folder, other):
    trees = (read_huggingface(each)[1] for each in (folder, other))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def edit_weights(folder, change):
    """Replaces the tensors by those that `change` makes from them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_imported_weights_give_transformers_logits(tmp_path, activation):
    model = torch_gpt2.make(tmp_path, activation_function=activation)
    config, params = read_huggingface(tmp_path)
    assert read_tokenizer(tmp_path) is None
    gelu = "exact" if activation == "gelu" else "tanh"
    assert config == small(dropout=0.25, bias=True, gelu=gelu)
    theirs = their_logits(model)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(our_logits(config, params), theirs, atol=2e-5)


def test_weights_in_several_files_are_the_same_weights(folder, shards):
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert_same_weights(folder, shards)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("transformer."),  # as in the hub's gpt2
        lambda name: f"_orig_mod.{name}",
    ],
)
def test_prefixes_and_the_masks_of_old_files_make_no_difference(folder, shards, rename):
    masks = {
        "h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32),
        "h.0.attn.masked_bias": np.array(-1e4, np.float32),
    }
    edit_weights(folder, lambda old: {rename(name): old[name] for name in old} | masks)
    assert_same_weights(folder, shards)


def test_import_and_export_restore_every_tensor_and_setting(folder, tmp_path):
    config, params = read_huggingface(folder)
    write_huggingface(tmp_path / "out", config, params, None)
    folders = (folder, tmp_path / "out")
    before, after = (load_file(each / "model.safetensors") for each in folders)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in folders)
    its_own = {"bos_token_id", "eos_token_id", "initializer_range"}
    its_own |= {"embd_pdrop", "attn_pdrop"}  # ours has a single dropout rate
    for name in ours.keys() & theirs.keys() - its_own:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize(("gelu", "bias"), [("exact", True), ("tanh", False)])
def test_transformers_gives_an_exported_models_logits(tmp_path, bpe, gelu, bias):
    config = small(bias=bias, gelu=gelu)
    params = random_params(config)
    write_huggingface(tmp_path, config, params, bpe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.eos_token_id == bpe.end_of_text == 299
    ours = our_logits(config, params)
    np.testing.assert_allclose(ours, their_logits(model), atol=2e-5)
    again, same = read_huggingface(tmp_path)
    assert again.bias  # GPT-2 always has biases
    np.testing.assert_array_equal(our_logits(again, same), ours)


@pytest.mark.parametrize("name", ["char", "special", "bpe", "gpt2"])
def test_an_exported_tokenizer_encodes_and_decodes_as_ours_does(tmp_path, bpe, name):
    characters = CharTokenizer.from_text(TEXT + "é🙂\r\n\t \u2028'").characters
    tokenizer = {
        "char": lambda: CharTokenizer(characters),
        "special": lambda: CharTokenizer(characters, ["<|a|>", "<|endoftext|>"]),
        "bpe": lambda: bpe,
        "gpt2": gpt2_tokenizer,
    }[name]()
    config = small(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=2)
    write_huggingface(tmp_path, config, random_params(config), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT[:200], " Juliet\n\n  tells's 🙂 é \r\n\t", "\u2028 ", ""):
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text
    end = "Puck<|endoftext|>"
    if tokenizer.end_of_text is not None:
        assert theirs(end).input_ids == tokenizer.encode_prompt(end).tolist()
    theirs.save_pretrained(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    again = read_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.to_json() == tokenizer.to_json()


ADDED = ["foo_bar", "a b", "<|user|>", "<|bot|>", "<|endoftext|>"]
STRIPS, WORD = "strips the spaces around it", "-word"
PIECES = st.sampled_from([*ADDED, STRIPS, WORD, "foo", "_bar", "<|", " ", "a", "é"])


@pytest.fixture(scope="module")
def with_added_tokens(make_once, bpe):
    """A model of transformers whose tokenizer has tokens more than it was made with."""

    def make(folder):
        write_huggingface(folder, SMALL, random_params(SMALL), bpe)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(ADDED[2:], special_tokens=True)
        strips = AddedToken(STRIPS, lstrip=True, rstrip=True)
        tokenizer.add_tokens([*ADDED, strips, AddedToken(WORD, single_word=True)])
        assert len(tokenizer) == 306
        tokenizer.save_pretrained(folder)
        torch_gpt2.make(folder, vocab_size=306)

    return make_once("added", make)


@pytest.fixture(scope="module")
def with_and_without_export(with_added_tokens, tmp_path_factory):
    """Their tokenizer, ours from their files, and both after an export of ours."""
    ours, exported = read_tokenizer(with_added_tokens), tmp_path_factory.mktemp("out")
    config, params = read_huggingface(with_added_tokens)
    write_huggingface(exported, config, params, ours)
    theirs, again = map(AutoTokenizer.from_pretrained, (with_added_tokens, exported))
    return (theirs, again), (ours, read_tokenizer(exported))


@given(st.lists(PIECES, max_size=8).map("".join), st.integers(1, 9))
@example(f"{STRIPS} a{STRIPS}", 1)  # the token takes a space after the first segment
def test_added_tokens_have_transformers_ids(with_and_without_export, text, size):
    """In prompts all are tokens; in documents special ones are text."""
    theirs, ours = with_and_without_export
    for their, our in zip(theirs, ours, strict=True):
        prompt, document = (
            their(text, split_special_tokens=split).input_ids for split in (False, True)
        )
        assert our.encode_prompt(text).tolist() == prompt
        assert our.encode(text).tolist() == document
        assert our.decode(prompt) == their.decode(prompt)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenizer, "_SEGMENT", size)
            chunks = our.encode_chunks([text[:size], text[size:]])
            assert [i for ids in chunks for i in ids.tolist()] == document


def test_a_model_with_added_tokens_is_imported_and_generates(
    with_added_tokens, tmp_path, call
):
    call("jaxgpt", "import", "huggingface", with_added_tokens, tmp_path / "run")
    prompt = ["--prompt", "<|user|>hi<|bot|>", "--max-new-tokens", 3]
    out, _ = call("generate.py", "--run-dir", tmp_path / "run", *prompt)
    assert out.startswith("<|user|>hi<|bot|>")
    run = load_run(tmp_path / "run")
    assert run.tokenizer.encode_prompt(prompt[1])[[0, -1]].tolist() == [300, 301]


def test_transformers_generates_our_greedy_text(tmp_path):
    tokenizer = CharTokenizer.from_text(TEXT)
    config = small(block_size=32, vocab_size=tokenizer.vocab_size, n_layer=1)
    params = random_params(config)
    write_huggingface(tmp_path, config, params, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    inputs = theirs("Puck tells", return_tensors="pt")
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(**inputs, **greedy)
    logits = our_logits(config, params, written[:, :-1].numpy())
    assert np.argmax(logits, -1)[0, -8:].tolist() == written[0, -8:].tolist()
    assert theirs.decode(written[0]) == tokenizer.decode(written[0].tolist())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama"),
        ({"activation_function": "silu"}, "activation_function=silu"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"n_head": 3}, "n_head=3"),
        ({"n_embd": "16"}, r"config\.json.*n_embd"),
        ({"n_layer": 3}, r"h\.2\.ln_1\.weight: .*none.*\(16,\)"),
        ({"n_layer": 1}, r"h\.1\.[^:]*: .*\(.*\).*none"),
        ({"vocab_size": 299}, r"\(300, 16\).*\(299, 16\)"),
    ],
)
def test_another_architecture_is_an_error_that_names_it(folder, setting, message):
    path = folder / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | setting), encoding="utf-8-sig"
    )
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{message}"):
        read_huggingface(folder)


def test_an_explicit_mlp_width_of_4_n_embd_is_supported(tmp_path):
    torch_gpt2.make(tmp_path, n_inner=64)
    assert read_huggingface(tmp_path)[0].n_embd == 16


def test_an_index_cannot_name_files_in_another_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "a")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {WTE: "../a"}}))
    with pytest.raises(FileNotFoundError, match=r"gpt2 has no a\b"):
        read_huggingface(folder)


def test_a_single_file_of_weights_takes_precedence_over_an_index(folder, shards):
    before = read_huggingface(folder)[1]
    for path in shards.glob("model*"):
        shutil.copy(path, folder)
    edit_weights(folder, lambda old: {name: 2 * array for name, array in old.items()})
    after = read_huggingface(folder)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(2 * a, b), before, after)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int32, "I32"), (np.complex64, "C64")], ids=str
)
def test_weights_that_are_not_floats_are_an_error(folder, dtype, name):
    edit_weights(folder, lambda old: old | {WTE: old[WTE].astype(dtype)})
    with pytest.raises(ValueError, match=rf"wte\.weight .*{name}"):
        read_huggingface(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_become_float32(folder, dtype):
    halves = load_file(folder / "model.safetensors")[WTE].astype(dtype)
    edit_weights(folder, lambda old: {name: old[name].astype(dtype) for name in old})
    table = read_huggingface(folder)[1]["wte"]["embedding"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(table, halves.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float32, np.nan), (np.float16, np.inf), (np.float64, -1e39)],
    ids=["nan", "infinite", "too large for float32"],
)
def test_a_weight_that_is_not_finite_is_an_error(folder, dtype, value):
    def change(tensors):
        tensors[MLP] = tensors[MLP].astype(dtype)
        tensors[MLP][3, 5] = value
        return tensors

    edit_weights(folder, change)
    with pytest.raises(ValueError, match=rf"{re.escape(MLP)} .* 1 of 1,024 "):
        read_huggingface(folder)


def test_a_missing_file_is_an_error_that_names_it(shards):
    shard = sorted(shards.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        read_huggingface(shards)
    (shards / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"shards .*config\.json"):
        read_huggingface(shards)


def test_a_tokenizer_of_words_is_not_read_as_characters(folder):
    words = huggingface._characters_as_words(CharTokenizer("ab"))
    content = json.loads(words.to_str())
    for vocab in ({"to": 0, "be": 1}, {"a": 0, "b": 2}):
        content["model"]["vocab"] = vocab
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"tokenizer\.json"):
            read_tokenizer(folder)


COMMIT = "0" * 40
REQUESTED = []


class Hub(SimpleHTTPRequestHandler):
    """A hub of files, with the headers that a download needs."""

    def send_head(self):
        REQUESTED.append(self.path)
        return super().send_head()

    def end_headers(self):
        self.send_header("ETag", f'"{self.path.split("/")[-1]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        super().end_headers()

    def log_message(self, *args):
        pass


def as_on_the_hub(tokenizer):
    """The tokenizer.json in the older form that GPT-2's repositories have."""
    content = json.loads(tokenizer.to_json())
    old = ("dropout", "unk_token", "fuse_unk", "vocab", "merges")
    model = {name: content["model"][name] for name in old}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    affixes = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return content | {
        "model": model | affixes,
        "pre_tokenizer": byte_level,
        "decoder": byte_level | {"add_prefix_space": True},
        "post_processor": byte_level | {"trim_offsets": False},
    }


@pytest.mark.torch
def test_a_model_is_fetched_once_from_the_hub_by_its_name(folder, bpe, tmp_path):
    (folder / "tokenizer.json").write_text(json.dumps(as_on_the_hub(bpe)))
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    files = [path.name for path in folder.iterdir()]
    site, api = tmp_path / "site", tmp_path / "site" / "api" / "models" / "gpt2"
    model = {"id": "gpt2", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
    tree = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
    for path, content in (("revision/main", model), (f"tree/{COMMIT}", tree)):
        (api / path).parent.mkdir(parents=True)
        (api / path).write_text(json.dumps(content))
    for revision in ("main", COMMIT):
        shutil.copytree(folder, site / "gpt2" / "resolve" / revision)
    arguments = ["-m", "jaxgpt", "import", "huggingface", "gpt2", tmp_path / "run"]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=site)) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
            "HF_HOME": str(tmp_path / "cache"),
        }
        finish(start_script(*arguments, **environment))
        hub.shutdown()
    run = load_run(tmp_path / "run")
    _, params = read_huggingface(folder)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert run.tokenizer.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()
    assert run.tokenizer.end_of_text == bpe.end_of_text
    assert not any(path.endswith(".bin") for path in REQUESTED)
    # Now the hub can't be reached, but its cache has the model.
    finish(start_script(*arguments, "--overwrite", **environment))


def test_a_hub_that_does_not_answer_is_an_error(call, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "_CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *args: url)
        with pytest.raises(FileNotFoundError, match=r"gpt2 .*0\.1 s"):
            call("jaxgpt", "import", "huggingface", "gpt2", tmp_path / "run")
    assert not (tmp_path / "run").exists()
