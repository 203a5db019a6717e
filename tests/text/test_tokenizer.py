import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.text import tokenizer
from jaxgpt.text.conversations import CHAT_TOKENS, is_chat_tokenizer
from jaxgpt.text.tokenizer import END_OF_TEXT, MASK, fits, load_tokenizer

TEXT = "To be, or not to be: that is the question 🙂.\n" * 20


@given(st.text(min_size=1))
def test_characters_survive_encoding_and_saving(tmp_path_factory, text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    path = tmp_path_factory.getbasetemp() / "characters.json"
    tokenizer.save(path)
    assert load_tokenizer(path).characters == tokenizer.characters


def test_ids_follow_the_sorted_distinct_characters():
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.characters == "ehlo"
    assert tokenizer.encode("hole").tolist() == [1, 3, 2, 0]


def test_an_unknown_character_or_id_is_an_error():
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(ValueError, match=r"'é' at position 2 .* 'abc'"):
        tokenizer.encode("abéz")
    for ids in ([3], [-1], [0, 99]):
        with pytest.raises(IndexError):
            tokenizer.decode(ids)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"type": "char"}', '{"type": "word"}', "null"]
    + [json.dumps({"type": "char", "characters": c}) for c in ("", "aa", 7, None, [1])]
    + [json.dumps({"characters": "ab", "special": s}) for s in ([1], [""], ["a"], 7)],
)
def test_a_file_without_a_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_tokenizer(path)


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 280)


def test_the_most_frequent_pairs_become_tokens(bpe):
    assert bpe.vocab_size == 280
    assert bpe.decode([bpe.end_of_text]) == "<|endoftext|>"
    assert len(bpe.encode(TEXT)) < 0.6 * len(TEXT.encode())
    small = BPETokenizer.train(["ababab abab"], 258)
    assert small.decode([256]) == "ab"
    assert small.encode("aab").tolist() == [*small.encode("a"), 256]


def test_training_cuts_words_after_256_bytes():
    """A word of n bytes costs n^2: 3 MB of DNA on one line took more than 6 minutes."""
    small = BPETokenizer.train(["ab" * 5000], 265)
    assert small.decode([263]) == "ab" * 128
    with pytest.raises(ValueError, match="265"):
        BPETokenizer.train(["ab" * 5000], 266)


def test_native_calls_are_interruptible(bpe, monkeypatch):
    def interrupted(call):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "interruptible", interrupted)
    for call in (
        lambda: BPETokenizer.train([TEXT], 258),
        lambda: bpe.encode(TEXT),
        lambda: bpe.encode_prompt(TEXT),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()


@given(text=st.text(), data=st.data())
def test_any_text_survives_bpe_and_cut_tokens_keep_whole_characters(bpe, text, data):
    ids = bpe.encode(text)
    assert ids.dtype == "int32"
    assert bpe.decode(ids) == text
    cut = data.draw(st.integers(0, len(ids)))
    whole = bpe.decode_bytes(ids[:cut]).decode("utf-8", "ignore")
    assert text.startswith(whole)
    assert bpe.decode(ids[:cut]).startswith(whole)
    bpe.decode(ids[cut:])


def test_bpe_does_not_depend_on_chunks_and_survives_saving(bpe, tmp_path):
    assert BPETokenizer.train([TEXT[:99], TEXT[99:]], 280).to_json() == bpe.to_json()
    path = tmp_path / "tokenizer.json"
    bpe.save(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as some editors do
    again = load_tokenizer(path)
    assert again.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()
    assert again.to_json() == bpe.to_json()


def test_only_bpe_may_leave_spare_rows_in_the_embedding(bpe):
    assert [fits(bpe, size) for size in (279, 280, 320, None)] == [0, 1, 1, 0]
    assert [fits(CharTokenizer("ab"), size) for size in (1, 2, 3)] == [0, 1, 0]


def test_end_of_text_is_a_token_in_prompts_only(bpe):
    prompt = "<|endoftext|>to be<|endoftext|><|endoftext|>"
    inner = bpe.encode("to be").tolist()
    assert bpe.encode_prompt(prompt).tolist() == [279, *inner, 279, 279]
    assert bpe.encode_prompt("to be").tolist() == inner
    assert 279 not in bpe.encode(prompt)
    chars = CharTokenizer.from_text(prompt)
    assert chars.encode_prompt(prompt).tolist() == chars.encode(prompt).tolist()
    special = CharTokenizer("<|endoftxb >", ["<|a|>", "<|endoftext|>"])
    inner = special.encode("to be").tolist()
    assert special.end_of_text == 13
    assert special.encode_prompt(prompt).tolist() == [13, *inner, 13, 13]
    assert max(special.encode(prompt)) < 12


def test_special_tokens_of_a_character_tokenizer_survive_saving(tmp_path):
    special = CharTokenizer("ab", ["<|endoftext|>", "<|x|>"])
    special.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.vocab_size == 4
    assert again.decode([1, 2, 0, 3]) == "b<|endoftext|>a<|x|>"
    assert again.to_json() == special.to_json()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_special_tokens_can_be_added_and_are_saved(tmp_path, kind):
    base = CharTokenizer("abc <|mks>")
    if kind == "bpe":
        base = BPETokenizer.train(["abc " * 9], 258)
    special = [END_OF_TEXT, MASK]
    tokenizer = base.with_special(special).with_special(special)
    assert tokenizer.vocab_size == base.vocab_size + (1 if kind == "bpe" else 2)
    assert tokenizer.special_id(MASK) == tokenizer.vocab_size - 1
    assert tokenizer.special_id(END_OF_TEXT) == tokenizer.end_of_text
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("abc", MASK):  # in a text it is text
        ids = again.encode(text)
        np.testing.assert_array_equal(ids, base.encode(text))
        assert again.decode(ids) == text
    assert again.encode_prompt(MASK).tolist() == [again.special_id(MASK)]


def test_added_tokens_become_special_and_keep_their_ids():
    library = tokenizers.Tokenizer.from_str(BPETokenizer.train(["abc "], 258).to_json())
    library.add_tokens(["<|end|>", "<|user|>"])
    before = BPETokenizer(library)
    tokenizer = before.with_special(CHAT_TOKENS)
    assert not is_chat_tokenizer(before)
    for each in (tokenizer, BPETokenizer.from_json(tokenizer.to_json().encode())):
        assert is_chat_tokenizer(each)
        ids = [*map(each.special_id, ("<|end|>", "<|user|>"))]
        assert ids == [*map(library.token_to_id, ("<|end|>", "<|user|>"))]
        assert each.vocab_size == before.vocab_size + 2
        assert {*ids}.isdisjoint(each.encode("<|end|><|user|>").tolist())


def test_a_batch_has_the_tokens_of_each_text():
    texts = ["abc abc", "", "b", "\ud800"] * 300
    tokenizer = BPETokenizer.train(["abc " * 9], 258)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
