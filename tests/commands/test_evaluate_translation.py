import json
from functools import partial
from itertools import zip_longest

import jax
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from jaxgpt import load_run, translate
from jaxgpt.commands import evaluate_translation
from jaxgpt.ops import cross_entropy
from jaxgpt.text.pairs import encode_sources

# Sources, and what each is to be translated into.
PAIRS = {
    "Lear tells a tale of winters.": ["Puck tells a tale of 7 winters."],
    "Romeo": ["Juliet tells a tale.", "Juliet", "Juliet a tale of Romeo tells."],
    "Puck tells": ["Hamlet tells of Lear.", "Lear tells."],
}


@pytest.fixture
def report_of(call, untrained, tmp_path):
    path = tmp_path / "pairs.tsv"
    rows = [(source, target) for source in PAIRS for target in PAIRS[source]]
    # The targets of a source do not follow each other.
    path.write_text("".join(f"{a}\t{b}\n" for a, b in rows[::2] + rows[1::2]))
    command = "jaxgpt", "evaluate", "--run-dir", untrained / "seq2seq"
    command += "--data-path", path, "--json", "--batch-size", 2
    return lambda *flags: json.loads(call(*command, *flags).out)


def test_translations_are_compared_with_all_targets_of_their_source(
    report_of, monkeypatch
):
    outputs = {
        "Lear tells a tale of winters.": "Puck tells a tale of 7 Lear winters.",
        "Romeo": "Juliet a tale of Romeo tells.",
        "Puck tells": "Lear tells.",
    }

    def translate_tokens(run, sources, beams, length_penalty, *_):
        assert (beams, length_penalty) == (3, 0.5)
        ids = (sources[row][:-1] for row in range(len(sources)))
        return [outputs[run.tokenizer.decode(each)] for each in ids]

    monkeypatch.setattr(evaluate_translation, "translate_tokens", translate_tokens)
    report = report_of("--beams", 3, "--length-penalty", 0.5)
    assert (report["pairs"], report["sources"]) == (6, 3)
    assert report["exact_match"] == pytest.approx(2 / 3)
    streams = [*zip_longest(*PAIRS.values())]
    for prefix, texts in (("", list(outputs.values())), ("copy_", list(PAIRS))):
        expected = BLEU().corpus_score(texts, streams).score
        assert report[f"{prefix}bleu"] == pytest.approx(expected)
    assert "tok:13a" in report["bleu_signature"]
    assert report["chrf"] > report["copy_chrf"]
    assert report["chrf_signature"].startswith("nrefs:var")


def test_the_loss_is_of_all_targets_and_the_translations_are_the_models(
    report_of, untrained
):
    run, report = load_run(untrained / "seq2seq"), report_of("--beams", 1)
    encode = partial(encode_sources, tokenizer=run.tokenizer, block_size=64)
    pairs = [(source, target) for source in PAIRS for target in PAIRS[source]]
    sources, targets = map(encode, zip(*pairs, strict=True))
    every, source = np.arange(len(pairs)), {"lengths_B": sources.lengths}
    source["source_BS"] = sources.padded(every, 64)
    targets_BT = targets.padded(every, 64)
    inputs_BT = np.insert(targets_BT, 0, run.tokenizer.end_of_text, axis=1)[:, :-1]
    apply = jax.jit(run.model.apply)
    loss_BT = cross_entropy(
        apply({"params": run.params}, inputs_BT, **source), targets_BT
    )
    losses = np.asarray(loss_BT)[np.arange(64) < targets.lengths[:, None]]
    assert report["tokens"] == len(losses)
    assert report["nats_per_token"] == pytest.approx(np.mean(losses), abs=2e-5)
    outputs = translate(run, list(PAIRS), beams=1)
    streams = [*zip_longest(*PAIRS.values())]
    assert report["chrf"] == pytest.approx(CHRF().corpus_score(outputs, streams).score)
    assert report["chrf"] > 0
