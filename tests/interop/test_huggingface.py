import hashlib
import http.server
import json
import re
import shutil
import socketserver
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import torch_gpt2
from conftest import TEXT, finish, start_script
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxgpt import BigramConfig, BPETokenizer, CharTokenizer, GPTConfig, load_run
from jaxgpt.interop import huggingface
from jaxgpt.interop.huggingface import (
    find_model,
    read_huggingface,
    read_tokenizer,
    write_huggingface,
)
from jaxgpt.models import build_model
from jaxgpt.text.pretrained import gpt2_tokenizer

TOKENS = np.random.default_rng(0).integers(300, size=(2, 16))


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 300)


@pytest.fixture
def folder(tmp_path):
    """A directory that transformers has saved."""
    torch_gpt2.make(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def our_logits(config, params, tokens=TOKENS):
    return build_model(config, "cpu").apply({"params": params}, tokens)


def their_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def random_params(config, seed=0):
    """Parameters that are none of them 0 or 1."""
    params = build_model(config, "cpu").init(jax.random.key(seed), TOKENS[:, :1])[
        "params"
    ]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, "f4"), params)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "gelu_pytorch_tanh"])
def test_imported_weights_give_transformers_logits(tmp_path, activation):
    model = torch_gpt2.make(tmp_path, activation_function=activation)
    config, params = read_huggingface(tmp_path)
    assert read_tokenizer(tmp_path) is None
    assert config == GPTConfig(
        block_size=16,
        vocab_size=300,
        n_layer=2,
        n_head=2,
        n_embd=16,
        dropout=0.25,
        bias=True,
        gelu="exact" if activation == "gelu" else "tanh",
    )
    theirs = their_logits(model)
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(our_logits(config, params), theirs, atol=2e-5)


def test_weights_in_several_files_are_the_same_weights(folder, tmp_path):
    torch_gpt2.make(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, other = (read_huggingface(f)[1] for f in (folder, tmp_path / "shards"))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.removeprefix("transformer."),  # as the hub's gpt2 has them
        lambda name: f"_orig_mod.{name}",
    ],
)
def test_other_names_and_the_masks_of_old_files_make_no_difference(folder, change):
    _, before = read_huggingface(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {change(name): array for name, array in tensors.items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 16, 16), np.float32)
    tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    _, after = read_huggingface(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_there_and_back_every_tensor_is_the_same(folder, tmp_path):
    config, params = read_huggingface(folder)
    write_huggingface(tmp_path / "out", config, params, None)
    before, after = (
        load_file(f / "model.safetensors") for f in (folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.tobytes() == after[name].tobytes(), name
    ours, theirs = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", folder)
    )
    its_own = {"bos_token_id", "eos_token_id", "initializer_range"}
    its_own |= {"embd_pdrop", "attn_pdrop"}  # we have but one dropout
    for name in ours.keys() & theirs.keys() - its_own:
        assert ours[name] == theirs[name], name


@pytest.mark.parametrize("gelu", ["exact", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_transformers_gives_an_exported_models_logits(tmp_path, bpe, gelu, bias):
    config = GPTConfig(
        block_size=16,
        vocab_size=300,
        n_layer=2,
        n_head=2,
        n_embd=16,
        bias=bias,
        gelu=gelu,
    )
    params = random_params(config)
    write_huggingface(tmp_path, config, params, bpe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.eos_token_id == bpe.end_of_text == 299
    np.testing.assert_allclose(
        our_logits(config, params), their_logits(model), atol=2e-5
    )
    again, same = read_huggingface(tmp_path)
    assert again.bias  # GPT-2 always has them
    np.testing.assert_array_equal(our_logits(again, same), our_logits(config, params))


@pytest.mark.parametrize("name", ["char", "bpe", "gpt2"])
def test_transformers_tokenizes_as_the_run_did_and_so_do_we_again(tmp_path, bpe, name):
    tokenizer = {
        "char": lambda: CharTokenizer.from_text(TEXT + "é🙂\r\n\t \u2028'"),
        "bpe": lambda: bpe,
        "gpt2": gpt2_tokenizer,
    }[name]()
    config = GPTConfig(
        block_size=16, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=2
    )
    write_huggingface(tmp_path, config, random_params(config), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT[:200], " Juliet\n\n  tells's 🙂 é \r\n\t", "\u2028 ", ""):
        ids = theirs(text).input_ids
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text
    theirs.save_pretrained(tmp_path / "saved")
    again = read_tokenizer(tmp_path / "saved")
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    again = read_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.to_json() == tokenizer.to_json()


def test_the_pipeline_of_transformers_writes_our_greedy_text(tmp_path):
    tokenizer = CharTokenizer.from_text(TEXT)
    config = GPTConfig(
        block_size=32, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16
    )
    write_huggingface(tmp_path, config, random_params(config), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    inputs = theirs("Puck tells", return_tensors="pt")
    written = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    logits = our_logits(config, random_params(config), written[:, :-1].numpy())
    assert np.argmax(logits, -1)[0, -8:].tolist() == written[0, -8:].tolist()
    assert len(theirs.decode(written[0])) == len("Puck tells") + 8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"model_type": "llama"}, "model_type=llama is not supported; gpt2 is"),
        ({"activation_function": "silu"}, "activation_function=silu is none of gelu_"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06 is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True is not"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"n_head": 3}, "not divisible by n_head=3"),
        ({"n_embd": "16"}, r"config\.json: "),
        ({"n_layer": 3}, r"h\.2\.ln_1\.weight: the file has none, the model \(16,\)"),
        ({"n_layer": 1}, r"h\.1\.[^:]*: the file has \(.*\), the model none"),
        ({"vocab_size": 299}, r"has \(300, 16\), the model \(299, 16\)"),
    ],
)
def test_another_architecture_is_named(folder, setting, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{message}"):
        read_huggingface(folder)


def test_a_width_that_is_spelt_out_is_no_other_architecture(tmp_path):
    torch_gpt2.make(tmp_path, n_inner=64)
    assert read_huggingface(tmp_path)[0].n_embd == 16


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json: "),
        ("config.json", b"{}", "it has no 'n_positions'"),
        ("config.json", b"[]", r"config\.json: "),
        ("model.safetensors", b"no tensors", "gpt2 has damaged weights"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", b"{", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", b"[]", r"tokenizer\.json is not a tokenizer"),
    ],
)
def test_a_damaged_file_is_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        (read_huggingface(folder), read_tokenizer(folder))


def test_an_index_leads_to_no_other_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "a")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"transformer.wte.weight": "../a"}}')
    with pytest.raises(FileNotFoundError, match="has no a;"):
        read_huggingface(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        read_huggingface(folder)


def test_one_file_goes_before_an_index_that_is_left_over(folder, tmp_path):
    torch_gpt2.make(tmp_path / "old", max_shard_size="10KB")
    _, before = read_huggingface(folder)
    tensors = load_file(folder / "model.safetensors")
    for path in (tmp_path / "old").glob("model-*"):
        shard = {name: 2 * array for name, array in load_file(path).items()}
        save_file(shard, folder / path.name)
    shutil.copy(tmp_path / "old" / "model.safetensors.index.json", folder)
    _, after = read_huggingface(folder)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert tensors["transformer.wte.weight"].any()


@pytest.mark.parametrize("dtype", [np.int32, np.complex64])
def test_weights_that_are_no_floats_are_refused(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"wte\.weight is of (I32|C64), not F64 or"):
        read_huggingface(folder)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    halves = {name: array.astype(dtype) for name, array in tensors.items()}
    save_file(halves, folder / "model.safetensors")
    _, params = read_huggingface(folder)
    table = params["wte"]["embedding"]
    assert table.dtype == np.float32
    np.testing.assert_array_equal(
        table, halves["transformer.wte.weight"].astype(np.float32)
    )


def test_a_missing_file_is_named(tmp_path):
    torch_gpt2.make(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=f"has no {shard.name}; .*save_pretrained"
    ):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is no model: it has no config\.json"):
        read_huggingface(tmp_path)


def test_a_tokenizer_of_words_is_not_taken_for_characters(folder):
    words = huggingface._characters_as_words(CharTokenizer("ab"))
    content = json.loads(words.to_str())
    for vocab in ({"to": 0, "be": 1}, {"a": 0, "b": 2}):
        content["model"]["vocab"] = vocab
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="it does not split text as GPT-2's"):
            read_tokenizer(folder)


def test_a_rung_of_the_ladder_is_no_gpt2(tmp_path):
    config = BigramConfig(vocab_size=3)
    with pytest.raises(ValueError, match="GPT-2 has no bigram model, only a gpt"):
        write_huggingface(tmp_path, config, {}, None)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: a model's files, and their checksums."""

    folder, asked = Path(), []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        commit, name = "0" * 40, self.path.split("/")[-1]
        self.asked.append(self.path)
        if self.path.startswith("/api/models/gpt2/"):
            paths = [path for path in self.folder.iterdir() if path.is_file()]
            files = [{"rfilename": path.name} for path in paths]
            model = {"id": "gpt2", "sha": commit, "siblings": files}
            tree = [
                {"type": "file", "path": path.name, "size": 1, "oid": "0"}
                for path in paths
            ]
            content = json.dumps(tree if "/tree/" in self.path else model).encode()
        elif self.path.startswith("/gpt2/resolve/") and (self.folder / name).exists():
            content = (self.folder / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Starts a server that stands for the hub; its cache is this test's own."""

    @contextmanager
    def start(server_class, handler):
        monkeypatch.setattr(server_class, "block_on_close", False)
        with server_class(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            monkeypatch.setenv("HF_ENDPOINT", url)
            monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
            yield
            server.shutdown()

    return start


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


def test_a_model_is_fetched_from_the_hub_by_its_name(hub, folder, bpe, tmp_path):
    (folder / "tokenizer.json").write_text(json.dumps(as_on_the_hub(bpe)))
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    Hub.folder = folder
    arguments = ["-m", "jaxgpt", "import", "huggingface", "gpt2", tmp_path / "run"]
    with hub(http.server.ThreadingHTTPServer, Hub):
        finish(start_script(*arguments))
    run = load_run(tmp_path / "run")
    _, params = read_huggingface(folder)
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert run.tokenizer.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()
    assert run.tokenizer.end_of_text == bpe.end_of_text
    assert not any(path.endswith(".bin") for path in Hub.asked)
    _, err = finish(start_script(*arguments, "--overwrite"))  # from the hub's cache
    assert err == ""


def test_a_silent_hub_is_an_error_within_seconds(hub, tmp_path):
    class Silent(socketserver.BaseRequestHandler):
        def handle(self):
            time.sleep(20)

    arguments = ["-m", "jaxgpt", "import", "huggingface", "gpt2", tmp_path / "run"]
    start = time.monotonic()
    with hub(socketserver.ThreadingTCPServer, Silent):
        _, err = finish(start_script(*arguments), code=1)
        assert time.monotonic() - start < 15  # 4 s, and imports
    assert err == (
        "error: gpt2 is no directory here, and the hub gave no model of that name: "
        "no answer within 4 s\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file"):
        find_model(str(tmp_path / "file"))
