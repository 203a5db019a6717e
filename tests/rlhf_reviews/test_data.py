import json

import numpy as np
import pytest
from conftest import TINY, changed, random_run

from jaxgpt import CharTokenizer
from jaxgpt.generation.decode import LateEnds
from jaxgpt.posttrain.rollout import Rollout, Rules, respond
from jaxgpt.rlhf_reviews import data

TOKENIZER = CharTokenizer("abcdefgh .!", ["<|endoftext|>"])


def rules(longest=8, shortest=3):
    late_ends = LateEnds(tuple(TOKENIZER.encode(".!").tolist()), shortest)
    return Rules(longest, (TOKENIZER.special_id("<|endoftext|>"),), late_ends)


def test_the_parts_are_disjoint_stable_and_without_other_sources(tmp_path):
    path = tmp_path / "reviews.jsonl"
    texts = [f"review {n}" for n in range(400)]
    rows = [
        {"text": text, "label": n % 2, "source": "imdb" if n % 4 else "other"}
        for n, text in enumerate(texts)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    parts = data.split_reviews(path)
    found = [row["text"] for part in "ABCD" for row in parts[part]]
    assert sorted(found) == sorted(text for n, text in enumerate(texts) if n % 4)
    assert all(50 < len(rows) < 100 for rows in parts.values())
    assert "".join(map(data.part_of, texts[:12])) == "CDCBBABCCABC"
    labels = {row["text"]: row["label"] for row in parts["A"]}
    assert all(
        label == ("positive" if int(text.split()[1]) % 2 else "negative")
        for text, label in labels.items()
    )


@pytest.mark.parametrize("other", [{"label": 2}, {"source": None}])
def test_a_review_without_its_label_or_source_is_named(tmp_path, other):
    path = tmp_path / "reviews.jsonl"
    path.write_text(json.dumps({"text": "fine", "label": 1, "source": "imdb"} | other))
    with pytest.raises(ValueError, match=f"reviews.jsonl:1.*{next(iter(other))}"):
        data.split_reviews(path)


def test_pieces_have_every_word_but_a_short_end():
    words = [f"w{n}" for n in range(23)]
    review = {"text": "\n ".join(words), "label": "positive"}
    found = data.pieces([review], 8)
    assert [row["text"].split() for row in found] == [
        words[:8],
        words[8:16],
        words[16:],
    ]
    assert {row["label"] for row in found} == {"positive"}
    short = {"text": " ".join(words[:19]), "label": "negative"}
    assert len(data.pieces([short], 8)) == 2  # the last 3 words are left out
    assert len(data.pieces([{"text": "a b c d", "label": "x"}], 8)) == 1


def cut(text, *limits):
    return data.cut(TOKENIZER.encode(text), rules(*limits))


def test_a_human_continuation_is_cut_as_the_policys():
    assert cut("a.bcdef!gh") == (8, True)  # the first end comes too early
    assert cut("abcdef gh.") == (8, False)
    assert cut("ab.") == (3, True)
    assert cut("abcdef!.") == (7, True)
    assert cut("abcd") == (4, True)  # the review ends
    assert cut("abcdefgh") == (8, False)


def test_a_rollout_ends_where_a_human_continuation_is_cut():
    model = {"vocab_size": TOKENIZER.vocab_size}
    run = random_run(changed(TINY, model=model), TOKENIZER)
    limits = rules(longest=5, shortest=3)
    prompts = [TOKENIZER.encode("ab")] * 200
    rolled = respond(run, prompts, limits, 0)
    for tokens, count, ended in zip(
        rolled.tokens_BT, rolled.counts_B, rolled.ended_B, strict=True
    ):
        rest = np.append(tokens[2 : 2 + count], TOKENIZER.encode("a"))
        assert data.cut(rest, limits) == (count, ended)
    assert len(set(rolled.counts_B)) == 5
    assert set(rolled.ended_B) == {True, False}


def test_beginnings_are_distinct_and_continue_as_the_review_does():
    texts = ["abcd efg", "abcd ab. efgh", "bbbb", "cccc a.b.c"]
    reviews = [{"text": text, "label": "positive"} for text in texts]
    found = data.beginnings(reviews, TOKENIZER, rules(), 4)
    assert {row["prompt"] for row in found} == {"abcd", "cccc"}  # nothing follows bbbb
    for row in found:
        assert any(text.startswith(row["prompt"] + row["text"]) for text in texts)
        assert row["tokens"] == len(row["text"])
    again = data.beginnings(reviews[::-1], TOKENIZER, rules(), 4)
    assert again == found


def label(count, **options):
    rng = np.random.default_rng(1)
    logits_N2 = rng.normal(size=(count, 2))
    texts = [(f"a{n}", f"b{n}") for n in range(count)]
    prompts = [f"p{n}" for n in range(count)]
    return logits_N2, data.label_pairs(prompts, texts, logits_N2, 0.1, **options)


def test_a_tenth_of_the_preferences_are_flipped_by_the_seed():
    logits_N2, rows = label(1000, seed=3)
    assert sum(row["flipped"] for row in rows) == 100
    for n, row in enumerate(rows):
        best = "ab"[int(logits_N2[n].argmax())] + str(n)
        assert (row["chosen"] == best) != row["flipped"]
        assert row["rejected"] == {"a": "b", "b": "a"}[row["chosen"][0]] + str(n)
        assert (row["margin"] < 0) == row["flipped"]
        assert abs(row["margin"]) == pytest.approx(abs(np.diff(logits_N2[n])[0]))
    assert label(1000, seed=3)[1] == rows
    other = label(1000, seed=4)[1]
    assert [row["flipped"] for row in other] != [row["flipped"] for row in rows]


def test_pairs_without_a_difference_are_left_out():
    texts = [("a", "a"), (" ", "b"), ("a", "b")]
    rows = data.label_pairs(["p", "q", "r"], texts, np.eye(3, 2), 0.0, 0)
    assert [row["prompt"] for row in rows] == ["r"]


def test_a_continuation_is_its_text_without_the_end_of_text():
    end = TOKENIZER.end_of_text
    tokens_BT = np.full((2, 6), end)
    tokens_BT[0, 1:6] = TOKENIZER.encode("abcd.")
    tokens_BT[1, 1:4] = TOKENIZER.encode("efg")
    counts_B = np.array([3, 3])
    rolled = Rollout(tokens_BT, np.array([3, 2]), counts_B, np.ones(2, bool))
    assert data.continuations(rolled, TOKENIZER) == ["cd.", "fg"]
