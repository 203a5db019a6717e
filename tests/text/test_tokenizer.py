import json
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.text.tokenizer import CharTokenizer, load_nanogpt_meta


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
    with pytest.raises(ValueError, match="the vocabulary from 0 to 2"):
        CharTokenizer("abc").decode(ids)


@given(st.text(min_size=1))
def test_load_gives_back_the_vocabulary_that_save_wrote(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer = CharTokenizer.from_text(text)
    tokenizer.save(path)
    assert CharTokenizer.load(path).characters == tokenizer.characters


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
        CharTokenizer.load(path)


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
