import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import torch_gpt2
import torch_nanogpt
from conftest import ROOT, TEXT, finish, start_script
from safetensors.numpy import load_file
from torch_nanogpt import CHARACTERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxgpt import BPETokenizer, CharTokenizer, load_run
from jaxgpt.commands import convert
from jaxgpt.text.pretrained import save_nanogpt_meta


@pytest.fixture
def ckpt(tmp_path):
    """A ckpt.pt of nanoGPT, with the meta.pkl of its characters beside it."""
    torch_nanogpt.make(tmp_path / "ckpt.pt")
    save_nanogpt_meta(tmp_path / "meta.pkl", CharTokenizer(CHARACTERS))
    return tmp_path / "ckpt.pt"


@pytest.fixture
def gpt2(tmp_path):
    """A directory of Hugging Face's GPT-2, with a tokenizer."""
    torch_gpt2.make(tmp_path / "gpt2")
    BPETokenizer.train([TEXT], 300).save(tmp_path / "gpt2" / "tokenizer.json")
    return tmp_path / "gpt2"


def test_a_nanogpt_checkpoint_becomes_a_run_like_any_other(
    call, ckpt, text_file, tmp_path
):
    run_dir, meta = tmp_path / "run", tmp_path / "meta.pkl"
    out, err = call("jaxgpt", "import", "nanogpt", ckpt, run_dir, "--meta", meta)
    assert out == f"{run_dir}\n"
    assert err == ""
    run = load_run(run_dir)
    assert run.step == 5
    assert run.tokenizer.characters == CHARACTERS
    sample = call("generate.py", "--run-dir", run_dir, "--prompt", "To be").out
    assert len(sample) == len("To be") + 500 + 1
    text = text_file.read_text().replace("1", "").replace("2", "")
    text_file.write_text(re.sub(r"\d", "", text))
    flags = ["--run-dir", run_dir, "--json", "--data-path", text_file]
    report = json.loads(call("jaxgpt", "evaluate", *flags).out)
    assert 3.9 < report["nats_per_token"] < 4.5  # ln 65 = 4.17
    # and it goes on training where nanoGPT stopped
    flags = ["--out-dir", run_dir, "--resume", "--data.path", text_file]
    _, err = call("train.py", *flags, "--train.max-steps", "9")
    assert f"--data.path gives its text, now {text_file}" in err
    assert load_run(run_dir, "latest").step == 9
    assert load_run(run_dir).config.data.tokenizer == str(run_dir / "tokenizer.json")


def test_nanogpt_comes_back_out_as_it_went_in(call, ckpt, tmp_path):
    call("jaxgpt", "import", "nanogpt", ckpt, tmp_path / "run")
    call("jaxgpt", "export", "nanogpt", tmp_path / "run", tmp_path / "out.pt")
    before, after = torch.load(ckpt), torch.load(tmp_path / "out.pt")
    assert after["best_val_loss"] == 2.5
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor), name
    for index, moments in before["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(after["optimizer"]["state"][index][name], tensor)


def test_without_a_tokenizer_text_says_how_to_supply_one(call, ckpt, tmp_path):
    run_dir = tmp_path / "run"
    _, err = call("jaxgpt", "import", "nanogpt", ckpt, run_dir)
    assert "--meta meta.pkl, --tokenizer gpt2 or --tokenizer DIR" in err
    assert load_run(run_dir).tokenizer is None
    for command in (
        ["generate.py", "--run-dir", run_dir],
        ["jaxgpt", "evaluate", "--run-dir", run_dir],
        ["jaxgpt", "attention", "--run-dir", run_dir, "--prompt", "a"],
    ):
        with pytest.raises(
            ValueError, match=r"no tokenizer\.json.*--tokenizer or --meta"
        ):
            call(*command)
    CharTokenizer(CHARACTERS).save(tmp_path / "saved.json")
    flags = ["--overwrite", "--tokenizer", tmp_path / "saved.json"]
    call("jaxgpt", "import", "nanogpt", ckpt, run_dir, *flags)
    assert load_run(run_dir).tokenizer.characters == CHARACTERS


def test_an_import_without_tokenizer_is_given_none_by_chance(
    call, ckpt, text_file, tmp_path
):
    text = (CHARACTERS + TEXT) * 2
    text_file.write_text(re.sub(r"\d", "", text))  # as many characters as the model has
    call("jaxgpt", "import", "nanogpt", ckpt, tmp_path / "run")
    flags = ["--out-dir", tmp_path / "run", "--resume", "--data.path", text_file]
    flags += ["--train.max-steps", "6"]
    with pytest.raises(
        ValueError, match=r"run has no tokenizer.* give the --data\.tokenizer"
    ):
        call("train.py", *flags)
    CharTokenizer(CHARACTERS).save(tmp_path / "own.json")
    call("train.py", *flags, "--data.tokenizer", tmp_path / "own.json")
    assert load_run(tmp_path / "run").tokenizer.characters == CHARACTERS


def test_a_run_of_characters_goes_to_nanogpt_with_its_vocabulary(
    call, tiny_run, tmp_path
):
    _, err = call("jaxgpt", "export", "nanogpt", tiny_run, tmp_path / "ckpt.pt")
    assert f"put {tmp_path / 'meta.pkl'} into its data/run/" in err
    run, checkpoint = load_run(tiny_run), torch.load(tmp_path / "ckpt.pt")
    assert checkpoint["config"]["dataset"] == "run"
    assert checkpoint["iter_num"] == 8
    itos = pickle.loads((tmp_path / "meta.pkl").read_bytes())["itos"]
    assert "".join(itos.values()) == run.tokenizer.characters
    model = torch_nanogpt.GPT(**checkpoint["model_args"] | {"dropout": 0})
    model.load_state_dict(checkpoint["model"])
    flags = ["--overwrite", "--dataset", "enwik8_char"]
    target = tmp_path / "ckpt.pt"
    _, err = call("jaxgpt", "export", "nanogpt", tiny_run, target, *flags)
    assert "into its data/enwik8_char/" in err
    assert torch.load(target)["config"]["dataset"] == "enwik8_char"
    tokens = run.tokenizer.encode("To be, o")[None]
    theirs = model(torch.tensor(tokens)).detach().numpy()
    ours = run.model.apply({"params": run.params}, tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_gpt2_becomes_a_run_that_can_be_tuned_on_other_text(
    call, gpt2, text_file, tmp_path
):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    out, err = call("jaxgpt", "import", "huggingface", gpt2, base)
    assert (out, err) == (f"{base}\n", "")
    _, err = call("jaxgpt", "export", "nanogpt", base, tmp_path / "ckpt.pt")
    assert "only GPT-2's" in err
    assert "not this model's tanh" in err
    assert torch.load(tmp_path / "ckpt.pt")["optimizer"]["state"] == {}
    assert call("generate.py", "--run-dir", base, "--prompt", "é🙂").out.startswith(
        "é🙂"
    )
    loss = evaluate(call, base, "--data-path", text_file)
    flags = ["smoke", "--init-from", base, "--out-dir", tuned, "--data.path", text_file]
    flags += ["--model.block-size", "8", "--train.max-steps", "20"]
    call("train.py", *flags)
    run = load_run(tuned)
    assert run.config.model.block_size == 8
    assert run.config.model.vocab_size == 300
    assert run.tokenizer.to_json() == load_run(base).tokenizer.to_json()
    assert evaluate(call, tuned) < loss - 0.5
    with pytest.raises(ValueError, match=r"no optimizer state; .* --init-from"):
        call("train.py", "--out-dir", base, "--resume")


def evaluate(call, run_dir, *flags):
    out, _ = call("jaxgpt", "evaluate", "--run-dir", run_dir, "--json", *flags)
    return json.loads(out)["nats_per_token"]


def test_a_run_goes_to_transformers_and_back(call, tiny_run, tmp_path):
    folder, back = tmp_path / "out", tmp_path / "back"
    assert (
        call("jaxgpt", "export", "huggingface", tiny_run, folder).out == f"{folder}\n"
    )
    run, model = load_run(tiny_run), AutoModelForCausalLM.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(folder)("To be, o", return_tensors="pt")
    ours = run.tokenizer.encode("To be, o")[None]
    assert theirs.input_ids.tolist() == ours.tolist()
    with torch.no_grad():
        logits = model(**theirs).logits.numpy()
    np.testing.assert_allclose(
        run.model.apply({"params": run.params}, ours), logits, atol=2e-5
    )
    call("jaxgpt", "import", "huggingface", folder, back)
    assert load_run(back).tokenizer.characters == run.tokenizer.characters
    call("jaxgpt", "export", "huggingface", back, tmp_path / "again")
    one, other = (
        load_file(f / "model.safetensors") for f in (folder, tmp_path / "again")
    )
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_tiny_shakespeare_has_nanogpts_name_for_it(call, smoke, tmp_path):
    _, err = call("jaxgpt", "export", "nanogpt", smoke[0], tmp_path / "ckpt.pt")
    assert "into its data/shakespeare_char/" in err


def test_another_model_that_lay_there_leaves_nothing_behind(call, tiny_run, tmp_path):
    folder = tmp_path / "out"
    torch_gpt2.make(folder, max_shard_size="10KB")
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("mine")
    call("jaxgpt", "export", "huggingface", tiny_run, folder, "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 11
    assert tokenizer.model_max_length == 8


def test_a_tokenizer_of_another_kind_can_be_replaced(call, gpt2, tmp_path):
    content = json.loads((gpt2 / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    BPETokenizer.train([TEXT], 290).save(tmp_path / "own.json")
    (gpt2 / "tokenizer.json").write_text(json.dumps(content))
    arguments = ["import", "huggingface", gpt2, tmp_path / "run"]
    with pytest.raises(
        ValueError, match=r"it does not split text as .*; --tokenizer takes"
    ):
        call("jaxgpt", *arguments)
    call("jaxgpt", *arguments, "--tokenizer", tmp_path / "own.json")
    assert load_run(tmp_path / "run").tokenizer.vocab_size == 290
    flags = ["--hf", gpt2, "--steps", "0", "--greedy-tokens", "0"]
    call("jaxgpt", "compare", *flags)  # which needs no tokenizer


def test_a_run_and_a_target_of_another_kind_are_never_written_over(
    call, tiny_run, tmp_path, gpt2
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        (["export", "huggingface", tiny_run, tiny_run], "is a run; give another"),
        (["export", "huggingface", tiny_run, tmp_path / "file"], "File exists"),
        (["export", "nanogpt", tiny_run, tmp_path / "folder"], "Is a directory"),
        (["import", "huggingface", gpt2, gpt2], "is not a run, it has config.json"),
    ):
        with pytest.raises(OSError, match=message):
            call("jaxgpt", *arguments, "--overwrite")
    assert load_run(tiny_run).step == 8
    assert (tmp_path / "file").read_text() == "mine"
    assert (gpt2 / "model.safetensors").exists()


def test_what_cannot_be_exported_writes_nothing(call, text_file, tmp_path):
    run_dir = tmp_path / "run"
    flags = ["--out-dir", run_dir, "--data.path", text_file, "--train.max-steps", "1"]
    flags += ["--train.eval-iters", "1"]
    call("train.py", "lecture-bigram", *flags)
    for format in ("nanogpt", "huggingface"):
        with pytest.raises(ValueError, match="has no bigram model, only a gpt"):
            call("jaxgpt", "export", format, run_dir, tmp_path / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", text_file.name]


def test_an_import_that_fails_half_way_keeps_the_run(
    call, tiny_run, gpt2, tmp_path, monkeypatch
):
    def full(*args):
        raise OSError("No space left on device")

    shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setattr(convert, "save_state", full)
    with pytest.raises(OSError, match="No space"):
        call("jaxgpt", "import", "huggingface", gpt2, tmp_path / "run", "--overwrite")
    assert load_run(tmp_path / "run").step == 8
    monkeypatch.undo()


def test_nothing_is_replaced_unless_asked(call, tiny_run, ckpt, gpt2, tmp_path):
    target = tmp_path / "out.pt"
    call("jaxgpt", "export", "nanogpt", tiny_run, target, "--overwrite")
    before = target.read_bytes()
    for arguments in (
        ["export", "nanogpt", tiny_run, target],
        ["export", "nanogpt", tiny_run, tmp_path / "new.pt"],  # beside a meta.pkl
        ["export", "huggingface", tiny_run, gpt2],
        ["import", "nanogpt", ckpt, tiny_run],
        ["import", "huggingface", gpt2, tiny_run],
    ):
        with pytest.raises(FileExistsError, match="--overwrite"):
            call("jaxgpt", *arguments)
    assert target.read_bytes() == before
    assert not (tmp_path / "new.pt").exists()
    call("jaxgpt", "export", "nanogpt", tiny_run, target, "--overwrite")


def test_weights_that_cannot_be_read_replace_no_run(call, tiny_run, tmp_path, ckpt):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pt").write_bytes(b"")
    for source in (
        ["huggingface", tmp_path / "empty"],
        ["nanogpt", tmp_path / "bad.pt"],
    ):
        with pytest.raises((ValueError, OSError)):
            call("jaxgpt", "import", *source, tiny_run, "--overwrite")
    assert load_run(tiny_run).step == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "huggingface", "RUN", "x", "--dataset", "d"], "leave it out"),
        (
            ["import", "nanogpt", "CKPT", "RUN", "--meta", "m", "--tokenizer", "t"],
            "exclude each other",
        ),
        (
            ["import", "nanogpt", "CKPT", "RUN", "--tokenizer", "gpt3"],
            "tokenizer 'gpt3'",
        ),
        (
            ["import", "huggingface", "GPT2", "RUN", "--tokenizer", "gpt2"],
            "tokenizer has 50257 tokens, and the embedding table 300 rows",
        ),
        (["export", "nanogpt", "RUN", "x.pt"], r"is not a run: it has no config\.json"),
    ],
)
def test_bad_input_is_an_error_that_names_it(
    call, ckpt, gpt2, tmp_path, arguments, message
):
    names = {"GPT2": gpt2, "CKPT": ckpt, "RUN": tmp_path / "run"}
    with pytest.raises((ValueError, OSError), match=message):
        call("jaxgpt", *[names.get(word, word) for word in arguments])
    assert not (tmp_path / "run").exists()


def test_without_torch_the_error_says_what_to_install(ckpt, tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_script("-m", "jaxgpt", "import", "nanogpt", ckpt, tmp_path / "run")
    _, err = finish(process, code=1)
    assert err == (
        "error: this needs torch; install it with "
        "`pip install -r requirements-interop.txt`\n"
    )


@pytest.mark.slow
def test_gpt2_124m_is_imported_in_3_times_its_memory(tmp_path):
    torch_gpt2.make(
        tmp_path / "gpt2",
        n_layer=12,
        n_head=12,
        n_embd=768,
        n_positions=1024,
        vocab_size=50257,
    )
    command = [sys.executable, "-m", "jaxgpt", "import", "huggingface"]
    process = subprocess.Popen(
        [*command, tmp_path / "gpt2", tmp_path / "run"], cwd=ROOT
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    weights = (tmp_path / "gpt2" / "model.safetensors").stat().st_size
    unit = 1 if sys.platform == "darwin" else 1024
    assert weights > 4 * 124e6
    assert usage.ru_maxrss * unit < 3 * weights
    run = load_run(tmp_path / "run")
    assert sum(leaf.size for leaf in jax.tree.leaves(run.params)) == 124_439_808
