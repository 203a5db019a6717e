import csv
import itertools
import json
import math
import re
import shutil
from functools import partial

import jax
import matplotlib.image
import numpy as np
import pytest
from conftest import TINY, changed, init_model, logits_of, save_params

from jaxgpt import BPETokenizer, classify, load_run
from jaxgpt.commands import evaluate as evaluate_module
from jaxgpt.commands.evaluate import count_text
from jaxgpt.ops import cross_entropy
from jaxgpt.run import TOKENIZER, save_config, with_chat_tokens
from jaxgpt.text.batches import EVAL_SEED
from jaxgpt.text.corpus import load_corpus, load_split
from jaxgpt.text.examples import row_keys
from jaxgpt.text.shards import Tokens
from jaxgpt.training.checkpoint import open_checkpoints
from jaxgpt.training.label_metrics import label_metrics


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


def test_the_loss_of_conversations_is_of_answers_alone(call, untrained, tmp_path):
    """By a model that has not learned the chat's tokens: each is the mean row."""
    conversations = [["a ruler", "Lear."], ["a tale", "of winter", "Lear", "Romeo"]]
    with (tmp_path / "a.jsonl").open("w") as file:
        for texts in conversations:
            roles = itertools.cycle(("user", "assistant"))
            pairs = zip(roles, texts, strict=False)
            messages = [{"role": role, "content": text} for role, text in pairs]
            print(json.dumps({"messages": messages}), file=file)
    words = "--packing", "conversations", "--data-path", tmp_path / "a.jsonl", "--json"
    out = call("jaxgpt", "evaluate", "--run-dir", untrained / "gpt", *words).out
    report, run = json.loads(out), with_chat_tokens(load_run(untrained / "gpt"))
    of_text, of_ends = [], []
    for texts in conversations:
        tokens, is_text, is_end = [run.tokenizer.end_of_text], [], []
        for i, text in enumerate(texts):
            role = ("<|user|>", "<|assistant|>")[i % 2]
            ids = run.tokenizer.encode_prompt(f"{role}{text}<|end|>").tolist()
            tokens += ids
            is_text += [False, *[i % 2 == 1] * (len(ids) - 2), False]
            is_end += [*[False] * (len(ids) - 1), i % 2 == 1]
        logits_BTV = logits_of(run.model, run.params, np.array([tokens[:-1]]))
        losses = np.array(cross_entropy(logits_BTV, np.array([tokens[1:]]))[0])
        of_text += losses[is_text].tolist()
        of_ends += losses[is_end].tolist()
    both = of_text + of_ends
    assert (report["answers"], report["tokens"], report["bytes"]) == (3, 22, 19)
    assert report["nats_per_token"] == pytest.approx(np.mean(both), abs=1e-5)
    assert report["nats_per_byte"] == pytest.approx(np.mean(of_text), abs=1e-5)
    table_VC = np.array(run.params["wte"]["embedding"])
    known_VC = table_VC[: load_run(untrained / "gpt").tokenizer.vocab_size]
    np.testing.assert_allclose(
        table_VC[len(known_VC) :],
        np.broadcast_to(known_VC.mean(0), (4, table_VC.shape[1])),
        rtol=1e-5,
    )


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


@pytest.fixture
def labelled(tmp_path):
    """A CSV file with texts of three labels from two sources, and its rows."""
    rows = [
        (f"{name} tells a tale of {n} winters.", label, f"source {n % 2}")
        for n in range(12)
        for name, label in [("Lear", "no"), ("Puck", "perhaps"), ("Romeo", "no")]
    ]
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), *rows])
    return path, rows


def test_the_report_on_a_classifier_is_of_its_predictions(
    call, untrained, labelled, tmp_path
):
    path, rows = labelled
    run_dir = shutil.copytree(untrained / "classifier", tmp_path / "run")
    flags = "evaluate", "--run-dir", run_dir, "--data-path", path
    report = json.loads(call("jaxgpt", *flags, "--json").out)
    run = load_run(run_dir)
    labels, (texts, true, sources) = run.config.model.labels, zip(*rows, strict=True)
    log_probs_NK = np.log(classify(run, texts))
    labels_N, sources_N = np.array([labels.index(t) for t in true]), np.array(sources)
    assert (report["split"], report["labels"]) == ("all", list(labels))
    by_source = [(sources_N == name, of) for name, of in report["by_source"].items()]
    assert report["by_source"].keys() == set(sources)
    for rows_N, found in [(slice(None), report), *by_source]:
        expected = label_metrics(log_probs_NK[rows_N], labels_N[rows_N])
        assert found["f1"].keys() == set(labels)
        found = found | {"f1": list(found["f1"].values())}
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    assert 0 < report["accuracy"] < 1

    (run_dir / "confusion.png").unlink()
    out, _ = call("jaxgpt", *flags)
    assert matplotlib.image.imread(run_dir / "confusion.png").ndim == 3
    for shown in (*labels, *set(sources), f"{report['macro_f1']:.4f}"):
        assert shown in out
    for row in report["confusion"]:
        assert re.search(r"\D+".join(map(str, row)), out)
    lines = {line.rsplit(maxsplit=1)[0] for line in out.splitlines()[:7]}
    assert {"accuracy", "loss", "calibration error"} <= lines


def test_only_labels_that_a_classifier_knows_can_be_evaluated(
    call, untrained, labelled
):
    path, _ = labelled
    path.write_text(path.read_text().replace("perhaps", "maybe"))
    flags = "--run-dir", untrained / "classifier", "--data-path", path
    with pytest.raises(ValueError, match=r"'maybe' .*'perhaps'"):
        call("jaxgpt", "evaluate", *flags)


def test_the_report_on_a_masked_language_model_is_of_the_masked_tokens(
    call, untrained, labelled
):
    run_dir, (path, _) = untrained / "masked-lm", labelled
    flags = "evaluate", "--run-dir", run_dir, "--data-path", path, "--split", "train"
    report = json.loads(call("jaxgpt", *flags, "--json").out)
    assert json.loads(call("jaxgpt", *flags, "--json").out) == report

    run = load_run(run_dir)
    config = changed(run.config, data={"path": (str(path),)})
    texts = load_split(config, "train", print, run.tokenizer)
    row_N, T = np.arange(len(texts)), config.model.block_size
    batch = texts.read(row_N, T, np.ones(len(texts)), row_keys(EVAL_SEED, row_N))
    apply = jax.jit(run.model.apply)
    inputs = {"tokens_BT": batch.tokens_BT, "lengths_B": batch.lengths_B}
    logits_NTV = apply({"params": run.params}, **inputs)
    at, counted = batch.positions_BK[..., None], batch.weights_BK > 0
    logits_MV = np.take_along_axis(np.asarray(logits_NTV), at, axis=1)[counted]
    targets_M = batch.targets_BK[counted]
    loss = float(cross_entropy(logits_MV, targets_M).mean())
    assert report == {
        "split": "train",
        "examples": len(texts),
        "tokens": len(targets_M),
        "nats_per_token": pytest.approx(loss, abs=1e-5),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-4),
        "accuracy": pytest.approx((logits_MV.argmax(axis=1) == targets_M).mean()),
    }
