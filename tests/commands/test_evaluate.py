import json
import math
from functools import partial

import numpy as np
import pytest

from jaxgpt import load_run
from jaxgpt.ops import cross_entropy
from jaxgpt.run import TOKENIZER
from jaxgpt.text.corpus import load_corpus


@pytest.fixture
def evaluate(call, tiny_run):
    """Calls the command on a run; returns stdout and stderr."""
    return partial(call, "jaxgpt", "evaluate", "--run-dir", tiny_run)


def test_json_is_the_exact_loss_whatever_the_batch_size(evaluate, tiny_run):
    run = load_run(tiny_run)
    tokens = load_corpus(run.config)[0].train.astype(np.int32)  # of 95 windows
    losses = []
    for start in range(0, len(tokens) - 1, run.config.model.block_size):
        window = tokens[start : start + run.config.model.block_size + 1][None]
        logits = run.model.apply({"params": run.params}, window[:, :-1])
        losses += cross_entropy(logits, window[:, 1:])[0].tolist()
    for batch_size in (1, 7, 64):
        flags = ["--json", "--split", "train", "--batch-size", batch_size]
        report = json.loads(evaluate(*flags).out)
        assert list(report) == [
            "split",
            "tokens",
            "nats_per_token",
            "standard_error",
            "perplexity",
            "bits_per_character",
        ]
        assert report["split"] == "train"
        assert report["tokens"] == len(tokens) - 1 == len(losses)
        nats = report["nats_per_token"]
        assert nats == pytest.approx(np.mean(losses), abs=1e-5)
        assert report["perplexity"] == pytest.approx(math.exp(nats))
        assert report["bits_per_character"] == pytest.approx(nats / math.log(2))
        assert 0 < report["standard_error"] < nats


def test_the_report_without_json_tells_the_same(evaluate):
    report = json.loads(evaluate("--json").out)
    lines = dict(line.rsplit(maxsplit=1) for line in evaluate().out.splitlines())
    assert lines.keys() == {name.replace("_", " ") for name in report}
    assert lines["tokens"] == str(report["tokens"])
    assert lines["nats per token"] == f"{report['nats_per_token']:.4f}"


def test_the_split_is_val_and_the_checkpoint_the_best_unless_named(evaluate, tiny_run):
    report = json.loads(evaluate("--json").out)
    assert report["split"] == "val"
    assert report["tokens"] == 84 - 1
    step = load_run(tiny_run).step
    for name in ("best", "latest", step):
        assert json.loads(evaluate("--json", "--checkpoint", name).out) == report


def test_a_stride_reads_the_same_tokens_in_another_way(evaluate):
    plain, overlapping = (
        json.loads(evaluate("--json", *flags).out) for flags in ([], ["--stride", "1"])
    )
    assert overlapping["tokens"] == plain["tokens"]
    assert overlapping["nats_per_token"] != plain["nats_per_token"]


def test_other_text_than_the_runs_can_be_given(evaluate, tiny_run, tmp_path):
    run = load_run(tiny_run)
    text = tmp_path / "other.txt"
    text.write_text("be to not or " * 60)
    out, err = evaluate("--json", "--data-path", text)
    assert f"evaluating on the val split of {text}" in err
    report, own = json.loads(out), json.loads(evaluate("--json").out)
    assert report["tokens"] == 13 * 60 - int(0.9 * 13 * 60) - 1
    assert report["nats_per_token"] != own["nats_per_token"]
    tokens = np.resize(run.tokenizer.encode("be to not or "), 400).astype(np.uint16)
    for split in ("train", "val"):
        tokens.tofile(tmp_path / f"{split}.bin")
    report = json.loads(evaluate("--json", "--data-path", tmp_path).out)
    assert report["tokens"] == 399


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stride", "9"], "stride=9 must be from 1 to block_size=8"),
        (["--stride", "0"], "stride=0 must be from 1 to block_size=8"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--checkpoint", "3"], "checkpoint '3' is not one of: best, latest, 8"),
    ],
)
def test_bad_input_is_an_error_that_names_it(evaluate, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(*arguments)


def test_characters_are_unknown_without_a_tokenizer(call, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(11, size=99).astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    flags = [
        "--model.vocab-size",
        "11",
        "--train.max-steps",
        "1",
        "--train.eval-iters",
        "1",
    ]
    run_dir = tmp_path / "run"
    call("train.py", "smoke", "--data.path", tmp_path, "--out-dir", run_dir, *flags)
    assert not (run_dir / TOKENIZER).exists()
    out, _ = call("jaxgpt", "evaluate", "--run-dir", run_dir, "--json")
    report = json.loads(out)
    assert report["bits_per_character"] is None
    assert report["tokens"] == 98
    out, _ = call("jaxgpt", "evaluate", "--run-dir", run_dir)
    assert "bits per character  unknown" in out
