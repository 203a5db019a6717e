import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.text.pretrained import load_nanogpt_meta, save_nanogpt_meta
from jaxgpt.text.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    encode_prompt,
    fits,
    load_tokenizer,
)

TEXT = "To be, or not to be: that is the question 🙂.\n" * 20


@given(st.text(min_size=1))
def test_decode_undoes_encode_on_any_text(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_ids_follow_the_sorted_distinct_characters():
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.characters == "ehlo"
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("hole").tolist() == [1, 3, 2, 0]


def test_unknown_character_is_named_with_its_position_and_the_vocabulary():
    tokenizer = CharTokenizer.from_text("abc")
    message = (
        "character 'é' at position 2 is not in the vocabulary of 3 characters: 'abc'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer.encode("abéz")


@pytest.mark.parametrize("ids", [[3], [-1], [0, 99]])
def test_id_outside_the_vocabulary_is_an_error(ids):
    with pytest.raises(IndexError):
        CharTokenizer("abc").decode(ids)


@given(st.text(min_size=1))
def test_load_gives_back_the_vocabulary_that_save_wrote(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = CharTokenizer.from_text(text)
    tokenizer.save(path)
    assert load_tokenizer(path).characters == tokenizer.characters


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"type": "char"}', '{"type": "word"}', "null"]
    + [
        json.dumps({"type": "char", "characters": c})
        for c in ("", "aa", 7, None, ["a", "b"])
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_tokenizer(path)


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 280)


def test_the_commonest_pairs_become_tokens(bpe):
    assert bpe.vocab_size == 280
    assert bpe.end_of_text == 279
    assert bpe.decode([279]) == "<|endoftext|>"
    alone = BPETokenizer.train(["ababab abab"], 258)
    assert alone.decode([256]) == "ab"
    assert alone.encode("aab").tolist() == [*alone.encode("a"), 256]
    assert len(bpe.encode(TEXT)) < 0.6 * len(TEXT.encode())


@given(text=st.text())
def test_bytes_decode_to_any_text_that_they_encode(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode(text).dtype == "int32"


@given(text=st.text(), data=st.data())
def test_tokens_cut_inside_a_character_decode_to_the_characters_that_are_whole(
    bpe, text, data
):
    ids = bpe.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    whole = bpe.decode_bytes(ids[:cut]).decode("utf-8", "ignore")
    assert text.startswith(whole)
    assert bpe.decode(ids[:cut]).startswith(whole)
    bpe.decode(ids[cut:])


def test_training_again_gives_the_same_tokens(bpe):
    assert BPETokenizer.train([TEXT[:99], TEXT[99:]], 280).to_json() == bpe.to_json()


def test_load_gives_back_what_save_wrote(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode(TEXT).tolist() == bpe.encode(TEXT).tolist()
    assert again.to_json() == bpe.to_json()
    assert again.vocab_size == 280


@pytest.mark.parametrize(
    ("text", "vocab_size", "message"),
    [
        (TEXT, 256, "not give vocab_size=256, the nearest is 257"),
        ("ab ab", 300, "not give vocab_size=300, the nearest is 259"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(text, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer.train([text], vocab_size)


def test_only_bpe_may_leave_rows_of_the_embedding_to_spare(bpe):
    assert [fits(bpe, size) for size in (279, 280, 320, None)] == [0, 1, 1, 0]
    assert [fits(CharTokenizer("ab"), size) for size in (1, 2, 3)] == [0, 1, 0]


def test_a_prompt_may_part_documents_and_ordinary_text_may_not(bpe):
    prompt = "<|endoftext|>to be<|endoftext|><|endoftext|>"
    inner = bpe.encode("to be").tolist()
    assert encode_prompt(bpe, prompt).tolist() == [279, *inner, 279, 279]
    assert encode_prompt(bpe, "to be").tolist() == inner
    assert 279 not in bpe.encode(prompt)
    chars = CharTokenizer.from_text(prompt)
    assert encode_prompt(chars, prompt).tolist() == chars.encode(prompt).tolist()


def test_nanogpt_meta_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "meta.pkl"
    save_nanogpt_meta(path, CharTokenizer("zaé"))
    assert load_nanogpt_meta(path).characters == "zaé"
    meta = pickle.loads(path.read_bytes())  # as nanoGPT's sample.py does
    assert meta == {
        "vocab_size": 3,
        "itos": {0: "z", 1: "a", 2: "é"},
        "stoi": {"z": 0, "a": 1, "é": 2},
    }


def test_nanogpt_meta_keeps_its_own_order_of_ids(tmp_path):
    path = tmp_path / "meta.pkl"
    itos = {0: "z", 1: "a"}
    stoi = {"z": 0, "a": 1}
    path.write_bytes(pickle.dumps({"vocab_size": 2, "itos": itos, "stoi": stoi}))
    assert load_nanogpt_meta(path).encode("az").tolist() == [1, 0]


class Malicious:
    """Unpickling it the ordinary way creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "meta.pkl", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"itos": Malicious(trace)}))
    with pytest.raises(ValueError, match="holds no character vocabulary"):
        load_nanogpt_meta(path)
    assert not trace.exists()


@given(st.binary(max_size=64))
def test_any_bytes_as_meta_give_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("meta") / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no character vocabulary"):
        load_nanogpt_meta(path)
