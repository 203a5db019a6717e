"""A run whose rows are packed with documents, in everything that reads a run."""

import json

import numpy as np
import pytest
from conftest import TINY, changed, logits_of

import train
from jaxgpt import CharTokenizer, generate, load_run
from jaxgpt.ops import cross_entropy
from jaxgpt.run import prompt_tokens
from jaxgpt.text import packing
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.tokenizer import END_OF_TEXT
from jaxgpt.training.monitor import read_rows


@pytest.fixture(scope="module")
def packed_run(make_once):
    """A tiny model trained for 4 steps on 50 documents, many longer than a row."""

    def make(folder):
        texts = folder / "texts"
        texts.mkdir()
        for i in range(50):
            (texts / f"{i:02}.txt").write_text("To be, or not to be."[: 1 + 7 * i % 20])
        data = {"path": (str(texts),), "tokenizer": "bpe", "packing": "documents"}
        config = changed(TINY, model={"vocab_size": 257, "n_layer": 1}, data=data)
        config = changed(config, train={"max_steps": 4, "log_interval": 1})
        train.train(config, folder / "run", resume=False, overwrite=False)

    return make_once("packed_run", make) / "run"


def loss_alone(run, ids, end):
    """The mean loss of documents, a row of block_size at a time."""
    losses = []
    for text in np.split(ids, np.flatnonzero(ids == end) + 1):
        for start in range(0, len(text), T := run.config.model.block_size):
            piece = np.append(end, text)[start : start + T + 1].astype(np.int32)
            row = np.pad(piece, (0, T + 1 - len(piece)))[None]
            logits_BTV = logits_of(run.model, run.params, row[:, :-1])
            losses += cross_entropy(logits_BTV, row[:, 1:])[
                0, : len(piece) - 1
            ].tolist()
    assert len(losses) == len(ids)
    return np.mean(losses)


def test_training_and_evaluation_report_the_loss_of_the_documents_alone(
    packed_run, call, tmp_path
):
    run = load_run(packed_run, "latest")
    end = run.tokenizer.end_of_text
    val = np.asarray(load_corpus(run.config)[0].val)
    done = [row for row in read_rows(packed_run / "metrics.jsonl")][-1]
    expected = loss_alone(run, val, end)
    assert done["val_loss"] == pytest.approx(expected, abs=2e-5)
    flags = ["evaluate", "--run-dir", packed_run, "--checkpoint", "latest", "--json"]
    report = json.loads(call("jaxgpt", *flags).out)
    assert report["tokens"] == len(val)
    assert report["nats_per_token"] == pytest.approx(expected, abs=2e-5)
    (tmp_path / "a.txt").write_text("to be or not")  # a document without an end
    report = json.loads(call("jaxgpt", *flags, "--data-path", tmp_path).out)
    expected = loss_alone(run, run.tokenizer.encode("to be or not"), end)
    assert report["tokens"] == 12
    assert report["nats_per_token"] == pytest.approx(expected, abs=2e-5)


def test_with_weights_each_part_is_packed_once_to_train_on_and_to_estimate(
    tmp_path, monkeypatch
):
    paths, packed = [], []
    for name, size in (("a", 20), ("b", 30)):
        paths.append(str(tmp_path / name))
        (tmp_path / name).mkdir()
        CharTokenizer("abcd", [END_OF_TEXT]).save(tmp_path / name / "tokenizer.json")
        for split in ("train", "val"):
            ids = np.arange(size if split == "train" else 10, dtype=np.uint16) % 5
            ids.tofile(tmp_path / name / f"{split}.bin")
    data = {"path": tuple(paths), "weights": (1.0, 3.0), "packing": "documents"}
    config = changed(TINY, model={"vocab_size": 5}, data=data)
    calls = {"training_source": [], "evaluation_source": []}
    for name, splits in calls.items():
        monkeypatch.setattr(train, name, lambda split, _, s=splits: s.append(split))
    real_pack = packing.pack_documents

    def pack(tokens, *args):
        packed.append(len(tokens))
        return real_pack(tokens, *args)

    monkeypatch.setattr(packing, "pack_documents", pack)
    monkeypatch.delattr(train.evaluation, "make_eval_step")  # so nothing is compiled
    with pytest.raises(AttributeError, match="make_eval_step"):
        train.train(config, tmp_path / "run", resume=False, overwrite=False)
    assert sorted(packed) == [20, 20, 30]  # one of 20 is val, of both
    (trained,), (estimated, _) = calls.values()
    assert trained is estimated
    assert [len(part.tokens) for part in trained] == [20, 30]


def test_prompts_begin_a_document_as_in_training(packed_run, call):
    run = load_run(packed_run)
    end, (a, b) = run.tokenizer.end_of_text, run.tokenizer.encode("ab")
    for prompt, ids in {"": [end], "ab": [end, a, b]}.items():
        text, found = prompt_tokens(run, prompt)
        assert (text, found.tolist()) == (prompt, ids)
        spelt = prompt_tokens(run, f"<|endoftext|>{prompt}")[1]
        assert spelt.tolist() == ids
        out, _ = call("generate.py", "--run-dir", packed_run, f"--prompt={prompt}")
        assert out == f"{prompt}{generate(run, prompt)[0]}\n"


def test_prompts_begin_a_conversation_and_may_have_its_tokens(untrained, call):
    run, prompt = load_run(untrained / "chat"), "<|user|>Puck<|end|><|assistant|>"
    characters, special = (
        run.tokenizer.encode("Puck").tolist(),
        run.tokenizer.special_id,
    )
    turn = [special("<|user|>"), *characters, special("<|end|>")]
    ids = [special("<|endoftext|>"), *turn, special("<|assistant|>")]
    assert prompt_tokens(run, prompt)[1].tolist() == ids
    flags = ["--run-dir", untrained / "chat", "--prompt", prompt]
    out, _ = call("generate.py", *flags, "--max-new-tokens", 9)
    assert out == f"{prompt}{generate(run, prompt, max_new_tokens=9)[0]}\n"
