import jax
import numpy as np
import pytest
from conftest import TINY, changed, logits_of, random_run

from jaxgpt import CharTokenizer
from jaxgpt.classification import classify
from jaxgpt.rlhf_reviews import judges


@pytest.mark.parametrize(
    ("text", "repeats"),
    [
        ("it was good it was good", True),
        ("It was good. It was, Good!", True),
        ("it was good it was bad", False),
        ("no no no", False),
        ("no no no no", True),
        ("it's a film, it is a film", False),
        ("", False),
    ],
)
def test_a_trigram_repeats_if_its_three_words_do(text, repeats):
    assert judges.has_repeated_trigram(text) == repeats


def test_the_band_is_from_the_5th_to_the_95th_percentile():
    log_probs_N = np.random.default_rng(0).permutation(np.arange(101.0))
    assert judges.human_band(log_probs_N) == (5, 95)


def test_mean_log_probs_are_of_the_continuation_alone():
    tokenizer = CharTokenizer("abcdefghi.", ["<|endoftext|>"])
    config = changed(TINY, data={"packing": "documents"})
    run = random_run(config, tokenizer)
    found_N = judges.mean_log_probs(run, ["ab", "abc"], ["cd", "def.abcdefgh"])
    end = tokenizer.end_of_text
    for (kept, text), found in zip(
        (("ab", "cd"), ("", "def.abc")), found_N, strict=True
    ):
        ids = np.array([end, *tokenizer.encode(kept + text)])
        if not kept:  # of what exceeds the window, one token of the prompt is left
            ids[0] = tokenizer.encode("c")[0]
        logits_TV = logits_of(run.model, run.params, ids[None])[0]
        log_probs_TV = jax.nn.log_softmax(logits_TV)
        at = range(len(ids) - len(text), len(ids))
        expected = np.mean([log_probs_TV[t - 1, ids[t]] for t in at])
        assert found == pytest.approx(float(expected), abs=1e-5)


def test_the_judge_of_sentiment_reads_the_label_by_its_name():
    tokenizer = CharTokenizer("abcdefghi.", ["<|endoftext|>"])
    texts = ["abc", "defgh", "a.a.a", "hhh"]
    for labels in (judges.LABELS, judges.LABELS[::-1]):
        model = {"architecture": "classifier", "labels": labels}
        run = random_run(changed(TINY, model=model), tokenizer)
        probs_NK = classify(run, texts)
        expected = probs_NK[:, labels.index("positive")] > 0.5
        assert judges.is_positive(run, texts).tolist() == expected.tolist()


def finds_great(classifier, texts):
    """Stands for a classifier that knows one word."""
    return np.array(["great" in text for text in texts])


def test_gold_is_every_part_and_each_is_told_alone(monkeypatch):
    log_probs_N = np.array([-3.0, -3.0, -3.0, -3.0, -1.0, -9.0, -2.0])
    monkeypatch.setattr(judges, "mean_log_probs", lambda *_: log_probs_N)
    texts = [" a great film.", " a dull film.", " so great so great so great."]
    texts += [" a great film", " a great film.", " a great film.", " a great film."]
    rows = [{"prompt": "It is", "text": t, "ended": t.endswith(".")} for t in texts]
    monkeypatch.setattr(judges, "is_positive", finds_great)
    gold = judges.Gold(None, None, (-5.0, -2.0))
    found = judges.judge(gold, rows)
    wrong = {"positive": [1], "no_repeat": [2], "ended": [3], "likely": [4, 5]}
    for name, at in wrong.items():
        assert np.flatnonzero(~found[name]).tolist() == at
    assert np.flatnonzero(found["gold"]).tolist() == [0, 6]
    assert np.flatnonzero(found["not_counting_ended"]).tolist() == [0, 3, 6]
    assert np.flatnonzero(~found["vader"]).tolist() == [1]


def test_the_labeller_learns_words():
    rows = [
        {"text": f"film {n} was {word}", "label": label}
        for n in range(40)
        for word, label in (("superb", "positive"), ("awful", "negative"))
    ]
    labeller = judges.train_labeller(rows)
    logits_N = labeller.positive_logits(["superb", "awful", "superb awful", "x"])
    assert logits_N[0] > 1
    assert logits_N[1] < -1
    assert logits_N[2:] == pytest.approx(0, abs=0.1)


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(judges, "find_spec", lambda name: name != "sklearn")
    with pytest.raises(ImportError, match=r"scikit-learn.*requirements-rlhf.txt"):
        judges.check_installed()
