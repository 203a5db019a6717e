import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
from conftest import TINY, changed, init_model, logits_of, save_params

from jaxgpt import BPETokenizer, load_run
from jaxgpt.commands import evaluate as evaluate_module
from jaxgpt.commands.evaluate import count_text
from jaxgpt.ops import cross_entropy
from jaxgpt.run import TOKENIZER, save_config
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.shards import Tokens
from jaxgpt.training.checkpoint import open_checkpoints


@pytest.fixture
def evaluate(call, tiny_run):
    """Calls the command on a run; returns stdout and stderr."""
    return partial(call, "jaxgpt", "evaluate", "--run-dir", tiny_run)


@pytest.fixture
def report_of(evaluate):
    """Calls the command on a run; returns what it reports as JSON."""
    return lambda *flags: json.loads(evaluate("--json", *flags).out)


def bigram_run(run_dir, tokenizer):
    """Makes a run of an untrained bigram model with a tokenizer."""
    size = tokenizer.vocab_size
    config = changed(TINY, model={"architecture": "bigram", "vocab_size": size})
    save_config(run_dir, config, tokenizer)
    with open_checkpoints(run_dir / "checkpoints") as checkpoints:
        save_params(checkpoints, 8, init_model(**vars(config.model))[1])
    return run_dir


def test_the_report_is_of_the_exact_loss_for_every_batch_size(report_of, tiny_run):
    run = load_run(tiny_run)
    tokens = load_corpus(run.config)[0].train[:].astype(np.int32)  # of 95 windows
    losses = []
    for start in range(0, len(tokens) - 1, run.config.model.block_size):
        window_BT = tokens[None, start : start + run.config.model.block_size + 1]
        logits_BTV = logits_of(run.model, run.params, window_BT[:, :-1])
        losses += cross_entropy(logits_BTV, window_BT[:, 1:])[0].tolist()
    for batch_size in (1, 7, 64):
        report = report_of("--split", "train", "--batch-size", batch_size)
        nats, error = report["nats_per_token"], report.pop("standard_error")
        assert nats == pytest.approx(np.mean(losses), abs=1e-5)
        assert 0 < error < nats
        assert report == {
            "split": "train",
            "tokens": len(losses),
            "nats_per_token": nats,
            "perplexity": pytest.approx(math.exp(nats)),
            "bits_per_character": pytest.approx(nats / math.log(2)),
            "bits_per_byte": pytest.approx(nats / math.log(2)),
        }


def test_the_report_without_json_is_the_same(evaluate, report_of):
    report = report_of()
    lines = dict(line.rsplit(maxsplit=1) for line in evaluate().out.splitlines())
    assert lines.keys() == {name.replace("_", " ") for name in report}
    assert lines["tokens"] == str(report["tokens"])
    assert lines["nats per token"] == f"{report['nats_per_token']:.4f}"


def test_the_split_is_val_and_the_checkpoint_the_best_by_default(report_of, tiny_run):
    report = report_of()
    assert report["split"] == "val"
    assert report["tokens"] == 84 - 1
    for name in ("best", "latest", load_run(tiny_run).step):
        assert report_of("--checkpoint", name) == report


def test_a_stride_predicts_the_same_tokens_with_another_loss(report_of):
    plain, overlapping = report_of(), report_of("--stride", "1")
    assert overlapping["tokens"] == plain["tokens"]
    assert overlapping["nats_per_token"] != plain["nats_per_token"]


def test_other_text_than_the_runs_can_be_evaluated(evaluate, tiny_run, tmp_path):
    text = tmp_path / "other.txt"
    text.write_text("be to not or " * 60)
    out, err = evaluate("--json", "--data-path", text)
    assert str(text) in err
    report, own = json.loads(out), json.loads(evaluate("--json").out)
    assert (report["split"], report["tokens"]) == ("all", 13 * 60 - 1)
    assert report["nats_per_token"] != own["nats_per_token"]
    out, _ = evaluate("--json", "--data-path", text, "--split", "val")
    assert json.loads(out)["tokens"] == 13 * 60 - int(0.9 * 13 * 60) - 1


def test_a_text_shorter_than_a_window_is_enough(report_of, evaluate, tmp_path):
    (tmp_path / "a.txt").write_text("be")
    report = report_of("--data-path", tmp_path)
    assert (report["split"], report["tokens"]) == ("all", 1)
    assert report["standard_error"] is None
    (tmp_path / "a.txt").write_text("b")
    with pytest.raises(ValueError, match=r"all .* has 1;") as error:
        evaluate("--data-path", tmp_path)
    assert "--" not in str(error.value)  # no flag that train.py alone has


def test_ends_of_documents_are_predicted_but_are_no_text(call, tmp_path):
    run_dir = bigram_run(tmp_path / "run", BPETokenizer.train(["be"], 257))
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("to bé", encoding="utf-8")  # é is two tokens
    flags = ["evaluate", "--run-dir", run_dir, "--data-path", *paths]
    report = json.loads(call("jaxgpt", *flags, "--json").out)
    assert report["tokens"] == 13
    bits = 13 * report["nats_per_token"] / math.log(2)
    assert report["bits_per_character"] == pytest.approx(bits / 9)
    assert report["bits_per_byte"] == pytest.approx(bits / 11)  # without the first t


def test_text_is_counted_in_chunks(monkeypatch):
    tokenizer = BPETokenizer.train(["to be"], 258)
    ids = [*tokenizer.encode("é to be"), tokenizer.end_of_text] * 9
    tokens = Tokens([np.array(ids[:5]), np.array(ids[5:])])
    monkeypatch.setattr(evaluate_module, "_CHUNK", 2)
    assert count_text(tokenizer, tokens, 0) == (9 * 7, 9 * 8)
    assert count_text(tokenizer, tokens, 2) == (9 * 7 - 1, 9 * 8 - 2)


def test_documents_are_scored_as_a_whole_by_the_runs_tokenizer(call, tmp_path):
    texts = [f"to be {n}" for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    tokenizer = BPETokenizer.train(["to be"], 258)
    run_dir = bigram_run(tmp_path / "run", tokenizer)
    flags = ["evaluate", "--run-dir", run_dir, "--data-path", tmp_path / "a.jsonl"]
    report = json.loads(call("jaxgpt", *flags, "--json").out)
    ids = [id_ for text in texts for id_ in tokenizer.encode(text)]
    assert (report["split"], report["tokens"]) == ("all", len(ids) + 30 - 1)


def test_bits_are_unknown_without_a_tokenizer(call, tiny_run, tmp_path):
    for split in ("train", "val"):
        (np.arange(99) % 11).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    run_dir = shutil.copytree(tiny_run, tmp_path / "run")
    (run_dir / TOKENIZER).unlink()
    for folder, known in [(tiny_run, True), (run_dir, False)]:
        flags = ["evaluate", "--run-dir", folder, "--data-path", tmp_path]
        report = json.loads(call("jaxgpt", *flags, "--json").out)
        assert (report["bits_per_character"] is not None) == known
        assert report["tokens"] == 98
    out, _ = call("jaxgpt", *flags)
    lines = [line.split()[-1] for line in out.splitlines() if line.startswith("bits")]
    assert lines == ["unknown", "unknown"]
