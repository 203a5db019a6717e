import json
import pickle
import re
import shutil
import sys

import jax
import numpy as np
import pytest
import torch
import torch_gpt2
import torch_nanogpt
from conftest import TEXT, changed, contents, finish, logits_of, losses, start_script
from torch_nanogpt import CHARACTERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxgpt import BPETokenizer, CharTokenizer, load_run
from jaxgpt.commands import convert
from jaxgpt.run import load_config, prompt_tokens, save_config
from jaxgpt.text.conversations import is_chat_tokenizer
from jaxgpt.text.pretrained import save_nanogpt_meta
from jaxgpt.text.tinyshakespeare import SHA256
from jaxgpt.training.monitor import read_rows

LETTERS = re.sub(r"\d", "", CHARACTERS + TEXT) * 2  # all characters of the checkpoint


@pytest.fixture
def ckpt(tmp_path):
    """A ckpt.pt of nanoGPT, with the meta.pkl of its characters beside it."""
    torch_nanogpt.make(tmp_path / "ckpt.pt")
    save_nanogpt_meta(tmp_path / "meta.pkl", CharTokenizer(CHARACTERS))
    return tmp_path / "ckpt.pt"


@pytest.fixture
def gpt2(tmp_path):
    """A directory with a GPT-2 in Hugging Face's format, and a tokenizer."""
    torch_gpt2.make(tmp_path / "gpt2")
    BPETokenizer.train([TEXT], 300).save(tmp_path / "gpt2" / "tokenizer.json")
    return tmp_path / "gpt2"


@pytest.mark.torch
def test_an_imported_nanogpt_checkpoint_can_be_sampled_and_evaluated(
    call, ckpt, text_file, tmp_path
):
    run_dir, meta = tmp_path / "run", tmp_path / "meta.pkl"
    out, err = call("jaxgpt", "import", "nanogpt", ckpt, run_dir, "--meta", meta)
    assert (out, err) == (f"{run_dir}\n", "")
    run = load_run(run_dir)
    assert run.tokenizer.characters == CHARACTERS
    assert run.config.data.tokenizer == str(run_dir / "tokenizer.json")
    sampling = ["--prompt", "To be", "--max-new-tokens", "3"]
    out = call("generate.py", "--run-dir", run_dir, *sampling).out
    assert len(out) == len("To be") + 3 + 1
    text_file.write_text(LETTERS)
    flags = ["--run-dir", run_dir, "--data-path", text_file, "--json"]
    loss = json.loads(call("jaxgpt", "evaluate", *flags).out)["nats_per_token"]
    assert 3.9 < loss < 4.5  # ln 65 = 4.17


def test_nanogpt_import_and_export_are_inverse(call, ckpt, tmp_path):
    call("jaxgpt", "import", "nanogpt", ckpt, tmp_path / "run")
    call("jaxgpt", "export", "nanogpt", tmp_path / "run", tmp_path / "out.pt")
    saved = [torch.load(path) for path in (ckpt, tmp_path / "out.pt")]
    assert saved[1]["best_val_loss"] == 2.5
    trees = [(each["model"], each["optimizer"]["state"]) for each in saved]
    torch.testing.assert_close(*trees, rtol=0, atol=0)


@pytest.mark.slow
def test_an_import_without_tokenizer_needs_one_for_text_and_then_trains(
    call, ckpt, text_file, tmp_path
):
    run_dir, own = tmp_path / "run", tmp_path / "own.json"
    CharTokenizer(CHARACTERS).save(own)
    text_file.write_text(LETTERS)  # as many characters as the model has
    _, err = call("jaxgpt", "import", "nanogpt", ckpt, run_dir)
    assert "--meta meta.pkl" in err
    assert load_run(run_dir).tokenizer is None
    with pytest.raises(ValueError, match=r"tokenizer\.json.*--meta"):
        call("jaxgpt", "attention", "--run-dir", run_dir, "--prompt", "a")
    resume = ["--out-dir", run_dir, "--resume", "--train.max-steps", 9]
    resume += ["--data.path", text_file]
    with pytest.raises(ValueError, match=r"--data\.tokenizer"):
        call("train.py", *resume)
    call("train.py", *resume, "--data.tokenizer", own)
    assert list(losses(run_dir)) == [6, 7, 8, 9]  # nanoGPT made 5 steps
    assert load_run(run_dir, "latest").tokenizer.characters == CHARACTERS
    flags = ["--overwrite", "--tokenizer", own]
    call("jaxgpt", "import", "nanogpt", ckpt, run_dir, *flags)
    assert load_run(run_dir).tokenizer.characters == CHARACTERS


def test_an_exported_run_has_the_same_logits_in_nanogpt(call, tiny_run, tmp_path):
    target = tmp_path / "ckpt.pt"
    _, err = call("jaxgpt", "export", "nanogpt", tiny_run, target)
    assert f"{tmp_path / 'meta.pkl'} into its data/run/" in err
    run, checkpoint = load_run(tiny_run), torch.load(target)
    assert checkpoint["config"]["dataset"] == "run"
    assert checkpoint["iter_num"] == 8
    itos = pickle.loads((tmp_path / "meta.pkl").read_bytes())["itos"]
    assert "".join(itos.values()) == run.tokenizer.characters
    model = torch_nanogpt.GPT(**checkpoint["model_args"] | {"dropout": 0})
    model.load_state_dict(checkpoint["model"])
    tokens = run.tokenizer.encode("To be, o")[None]
    theirs = model(torch.tensor(tokens)).detach().numpy()
    ours = logits_of(run.model, run.params, tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_dataset_of_an_export_can_be_named(call, tiny_run, tmp_path):
    run_dir, target = tmp_path / "run", tmp_path / "ckpt.pt"
    shutil.copytree(tiny_run, run_dir)
    save_config(run_dir, changed(load_config(run_dir), data={"sha256": SHA256}), None)
    export = ["export", "nanogpt", run_dir, target, "--overwrite"]
    for flags, name in ([], "shakespeare_char"), (["--dataset", "mine"], "mine"):
        _, err = call("jaxgpt", *export, *flags)
        assert f"data/{name}/" in err
        assert torch.load(target)["config"]["dataset"] == name


@pytest.mark.slow
def test_an_imported_gpt2_can_be_fine_tuned(call, gpt2, text_file, tmp_path):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    out, err = call("jaxgpt", "import", "huggingface", gpt2, base)
    assert (out, err) == (f"{base}\n", "")
    _, err = call("jaxgpt", "export", "nanogpt", base, tmp_path / "ckpt.pt")
    assert "tanh" in err  # which nanoGPT does not have
    assert torch.load(tmp_path / "ckpt.pt")["optimizer"]["state"] == {}
    flags = ["smoke", "--init-from", base, "--out-dir", tuned, "--data.path", text_file]
    flags += ["--model.block-size", "8", "--train.max-steps", "20"]
    call("train.py", *flags)
    run = load_run(tuned)
    assert run.config.model.block_size == 8
    assert run.config.model.vocab_size == 300
    assert run.tokenizer.to_json() == load_run(base).tokenizer.to_json()
    first, *_, done = read_rows(tuned / "metrics.jsonl")
    assert done["val_loss"] < first["val_loss"] - 0.5


def test_an_exported_run_has_the_same_logits_in_transformers(call, tiny_run, tmp_path):
    folder, back, again = (tmp_path / name for name in ("out", "back", "again"))
    out, _ = call("jaxgpt", "export", "huggingface", tiny_run, folder)
    assert out == f"{folder}\n"
    run, model = load_run(tiny_run), AutoModelForCausalLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("To be, o", return_tensors="pt")
    theirs = model(**inputs).logits.detach().numpy()
    ours = logits_of(run.model, run.params, run.tokenizer.encode("To be, o")[None])
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    call("jaxgpt", "import", "huggingface", folder, back)
    call("jaxgpt", "export", "huggingface", back, again)
    assert contents(again) == contents(folder)


@pytest.mark.parametrize("format", ["nanogpt", "huggingface"])
def test_a_run_of_conversations_is_still_one_after_export_and_import(
    call, untrained, tmp_path, format
):
    target, meta = tmp_path / "exported", ["--meta", tmp_path / "meta.pkl"]
    call("jaxgpt", "export", format, untrained / "chat", target)
    meta = meta if format == "nanogpt" else []
    call("jaxgpt", "import", format, target, tmp_path / "back", *meta)
    before, after = map(load_run, (untrained / "chat", tmp_path / "back"))
    assert after.tokenizer.to_json() == before.tokenizer.to_json()
    assert is_chat_tokenizer(after.tokenizer)
    ids = [prompt_tokens(run, "Puck")[1].tolist() for run in (before, after)]
    assert ids[0] == ids[1]


def test_an_export_removes_the_files_of_the_model_it_replaces(call, tiny_run, tmp_path):
    folder = tmp_path / "out"
    torch_gpt2.make(folder, max_shard_size="10KB")
    names = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "README.md"]
    names += ["chat_template.jinja", "additional_chat_templates/tools.jinja"]
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / name).write_text("{}")
    call("jaxgpt", "export", "huggingface", tiny_run, folder, "--overwrite")
    call("jaxgpt", "export", "huggingface", tiny_run, tmp_path / "new")
    assert contents(folder) == contents(tmp_path / "new") | {"README.md": b"{}"}
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 8


def test_an_unsupported_tokenizer_can_be_replaced(call, gpt2, tmp_path):
    content = json.loads((gpt2 / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    BPETokenizer.train([TEXT], 290).save(tmp_path / "own.json")
    (gpt2 / "tokenizer.json").write_text(json.dumps(content))
    arguments = ["import", "huggingface", gpt2, tmp_path / "run"]
    with pytest.raises(ValueError, match=r"tokenizer\.json.*--tokenizer"):
        call("jaxgpt", *arguments)
    call("jaxgpt", *arguments, "--tokenizer", tmp_path / "own.json")
    assert load_run(tmp_path / "run").tokenizer.vocab_size == 290
    # To compare needs no tokenizer.
    call("jaxgpt", "compare", "--hf", gpt2, "--steps", 0, "--greedy-tokens", 0)


def test_an_import_that_fails_half_way_keeps_the_run(
    call, tiny_run, gpt2, tmp_path, monkeypatch
):
    def full(*args):
        raise OSError("No space left on device")

    run_dir = shutil.copytree(tiny_run, tmp_path / "run")
    before = contents(run_dir / "checkpoints")
    monkeypatch.setattr(convert, "save_state", full)
    with pytest.raises(OSError, match="No space"):
        call("jaxgpt", "import", "huggingface", gpt2, run_dir, "--overwrite")
    assert load_run(run_dir).step == 8
    assert contents(run_dir / "checkpoints") == before


def test_without_torch_the_error_names_it_and_the_requirements(ckpt, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    command = ("-m", "jaxgpt", "import", "nanogpt", ckpt, tmp_path / "run")
    _, err = finish(start_script(*command, PYTHONPATH=str(tmp_path)), code=1)
    (line,) = err.splitlines()
    assert re.match(r"error: .*torch.*requirements-interop\.txt", line)


@pytest.mark.slow
def test_gpt2_124m_is_imported_in_3_times_its_memory(tmp_path):
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
    torch_gpt2.make(tmp_path / "gpt2", vocab_size=50257, **sizes)
    # The peak of a process includes its parent's memory when it was forked, and that
    # of pytest is large: so another process between them starts and measures it.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "jaxgpt", "import", "huggingface"]
    command += [tmp_path / "gpt2", tmp_path / "run"]
    out, _ = finish(start_script("-c", measure, *command))
    unit = 1 if sys.platform == "darwin" else 1024
    weights = 4 * 124_439_808
    assert int(out.split()[-1]) * unit < 3 * weights
    params = jax.tree.leaves(load_run(tmp_path / "run").params)
    assert sum(leaf.nbytes for leaf in params) == weights
