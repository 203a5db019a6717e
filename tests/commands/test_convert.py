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
from conftest import TEXT, contents, finish, losses, start_script
from safetensors.numpy import load_file
from torch_nanogpt import CHARACTERS
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxgpt import BPETokenizer, CharTokenizer, load_run
from jaxgpt.commands import convert
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


def test_an_imported_nanogpt_checkpoint_can_be_sampled_and_evaluated(
    call, ckpt, text_file, tmp_path
):
    run_dir, meta = tmp_path / "run", tmp_path / "meta.pkl"
    out, err = call("jaxgpt", "import", "nanogpt", ckpt, run_dir, "--meta", meta)
    assert (out, err) == (f"{run_dir}\n", "")
    run = load_run(run_dir)
    assert run.step == 5
    assert run.tokenizer.characters == CHARACTERS
    assert run.config.data.tokenizer == str(run_dir / "tokenizer.json")
    flags = ["--run-dir", run_dir, "--prompt", "To be", "--max-new-tokens", "3"]
    assert len(call("generate.py", *flags).out) == len("To be") + 3 + 1
    text_file.write_text(LETTERS)
    flags = ["--run-dir", run_dir, "--data-path", text_file, "--json"]
    loss = json.loads(call("jaxgpt", "evaluate", *flags).out)["nats_per_token"]
    assert 3.9 < loss < 4.5  # ln 65 = 4.17


def test_nanogpt_import_and_export_are_inverse(call, ckpt, tmp_path):
    call("jaxgpt", "import", "nanogpt", ckpt, tmp_path / "run")
    call("jaxgpt", "export", "nanogpt", tmp_path / "run", tmp_path / "out.pt")
    before, after = torch.load(ckpt), torch.load(tmp_path / "out.pt")
    assert after["best_val_loss"] == 2.5
    for name, tensor in before["model"].items():
        assert torch.equal(after["model"][name], tensor), name
    for index, moments in before["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(after["optimizer"]["state"][index][name], tensor)


def test_an_import_without_tokenizer_needs_one_for_text_and_then_trains(
    call, ckpt, text_file, tmp_path
):
    run_dir, own = tmp_path / "run", tmp_path / "own.json"
    CharTokenizer(CHARACTERS).save(own)
    text_file.write_text(LETTERS)  # as many characters as the model has
    _, err = call("jaxgpt", "import", "nanogpt", ckpt, run_dir)
    assert "--meta meta.pkl" in err
    assert load_run(run_dir).tokenizer is None
    attention = ["attention", "--run-dir", run_dir, "--prompt", "a"]
    with pytest.raises(ValueError, match=r"tokenizer\.json.*--meta"):
        call("jaxgpt", *attention)
    flags = ["--out-dir", run_dir, "--resume", "--data.path", text_file]
    flags += ["--train.max-steps", "9"]
    with pytest.raises(ValueError, match=r"--data\.tokenizer"):
        call("train.py", *flags)
    call("train.py", *flags, "--data.tokenizer", own)
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
    ours = run.model.apply({"params": run.params}, tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_the_dataset_of_an_export_can_be_named(call, tiny_run, tmp_path):
    run_dir, target = tmp_path / "run", tmp_path / "ckpt.pt"
    shutil.copytree(tiny_run, run_dir)
    config = json.loads((run_dir / "config.json").read_text())
    config["data"]["sha256"] = SHA256  # trained on Tiny Shakespeare
    (run_dir / "config.json").write_text(json.dumps(config))
    for flags, name in ([], "shakespeare_char"), (["--dataset", "mine"], "mine"):
        flags = [*flags, "--overwrite"]
        _, err = call("jaxgpt", "export", "nanogpt", run_dir, target, *flags)
        assert f"data/{name}/" in err
        assert torch.load(target)["config"]["dataset"] == name


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
    theirs = AutoTokenizer.from_pretrained(folder)("To be, o", return_tensors="pt")
    tokens = run.tokenizer.encode("To be, o")[None]
    assert theirs.input_ids.tolist() == tokens.tolist()
    with torch.no_grad():
        logits = model(**theirs).logits.numpy()
    ours = run.model.apply({"params": run.params}, tokens)
    np.testing.assert_allclose(ours, logits, atol=2e-5)
    call("jaxgpt", "import", "huggingface", folder, back)
    assert load_run(back).tokenizer.characters == run.tokenizer.characters
    call("jaxgpt", "export", "huggingface", back, again)
    one, other = (load_file(f / "model.safetensors") for f in (folder, again))
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_an_export_removes_the_files_of_the_model_it_replaces(call, tiny_run, tmp_path):
    folder = tmp_path / "out"
    torch_gpt2.make(folder, max_shard_size="10KB")
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("mine")
    call("jaxgpt", "export", "huggingface", tiny_run, folder, "--overwrite")
    expected = {"config.json", "model.safetensors", "README.md"}
    expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == expected
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 11
    assert tokenizer.model_max_length == 8


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
    flags = ["--hf", gpt2, "--steps", "0", "--greedy-tokens", "0"]
    call("jaxgpt", "compare", *flags)  # needs no tokenizer


def test_an_import_that_fails_half_way_keeps_the_run(
    call, tiny_run, gpt2, tmp_path, monkeypatch
):
    def full(*args):
        raise OSError("No space left on device")

    run_dir = tmp_path / "run"
    shutil.copytree(tiny_run, run_dir)
    before = contents(run_dir / "checkpoints")
    monkeypatch.setattr(convert, "save_state", full)
    with pytest.raises(OSError, match="No space"):
        call("jaxgpt", "import", "huggingface", gpt2, run_dir, "--overwrite")
    assert load_run(run_dir).step == 8
    assert contents(run_dir / "checkpoints") == before


def test_without_torch_the_error_names_it_and_the_requirements(ckpt, monkeypatch):
    (ckpt.parent / "torch.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(ckpt.parent))
    arguments = ("import", "nanogpt", ckpt, ckpt.parent / "run")
    _, err = finish(start_script("-m", "jaxgpt", *arguments), code=1)
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
    weights = (tmp_path / "gpt2" / "model.safetensors").stat().st_size
    unit = 1 if sys.platform == "darwin" else 1024
    assert weights > 4 * 124e6
    assert int(out.split()[-1]) * unit < 3 * weights
    run = load_run(tmp_path / "run")
    assert sum(leaf.size for leaf in jax.tree.leaves(run.params)) == 124_439_808
