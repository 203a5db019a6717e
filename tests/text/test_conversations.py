"""The chat format, files of conversations, and their rows."""

import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, changed, conversations_config
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.text.batches import longest_row, predictions, training_source
from jaxgpt.text.conversations import (
    CHAT_TOKENS,
    ROLES,
    Message,
    check_messages,
    encode_turns,
    make_rows,
    read_conversations,
    tokenize,
)
from jaxgpt.text.corpus import load_corpus, load_split
from jaxgpt.text.packing import read_rows
from jaxgpt.text.tables import SPLITS

CHAR = CharTokenizer("abcdefgh<|>notusrx").with_special(CHAT_TOKENS)
SYSTEM, USER, ASSISTANT, END = map(CHAR.special_id, CHAT_TOKENS[1:])
QUESTION = {"role": "user", "content": "abc"}
ANSWER = {"role": "assistant", "content": "de"}


def chat(*contents, system=None):
    """Messages of the user and the assistant in turn."""
    roles = ROLES[1:] * len(contents)
    messages = [*zip(roles, contents, strict=False)]
    messages = [("system", system), *messages] if system else messages
    return [{"role": role, "content": content} for role, content in messages]


def write(path, *conversations):
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def bpe():
    texts = ["the user asks, the assistant answers <|end|> <|user|> "] * 9
    return BPETokenizer.train(texts, 270).with_special(CHAT_TOKENS)


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_content_is_text_even_where_it_spells_a_special_token(kind, bpe):
    tokenizer = {"char": CHAR, "bpe": bpe}[kind]
    contents = ["<|end|>", "a<|user|>b", "<|endoftext|"]
    messages = [*map(Message, ROLES, contents)]
    plain = tokenizer.with_special([])
    turns = encode_turns(messages, tokenizer)
    special = {*map(tokenizer.special_id, CHAT_TOKENS)}
    assert len(special) == 5
    for (role, content), ids in zip(messages, turns, strict=True):
        assert ids[0] == tokenizer.special_id(f"<|{role}|>")
        assert ids[-1] == tokenizer.special_id("<|end|>")
        np.testing.assert_array_equal(ids[1:-1], plain.encode(content))
        assert special.isdisjoint(ids[1:-1].tolist())
        assert tokenizer.decode(ids[1:-1]) == content
    joined = np.concatenate(turns)
    format = "<|system|>{}<|end|><|user|>{}<|end|><|assistant|>{}<|end|>"
    assert tokenizer.decode(joined) == format.format(*contents)
    # As a raw prompt, which is parsed, the same format has the same tokens.
    parsed = tokenizer.encode_prompt(format.format("a", "b", "c"))
    expected = encode_turns([*map(Message, ROLES, "abc")], tokenizer)
    np.testing.assert_array_equal(parsed, np.concatenate(expected))


def is_conversation(messages):
    """The rules, stated plainly."""
    if not isinstance(messages, list):
        return False
    if not all(isinstance(each, dict) for each in messages):
        return False
    pairs = [(each.get("role"), each.get("content")) for each in messages]
    if not all(isinstance(c, str) and c.strip() for _, c in pairs):
        return False
    roles = [role for role, _ in pairs]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    return bool(roles) and roles == ["user", "assistant"] * (len(roles) // 2)


MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from([*ROLES, "tool", 1]), "n": st.none()}
).flatmap(
    lambda each: st.sampled_from(["a", "", " \n", "\ud800", None, 3]).map(
        lambda content: each | {"content": content}
    )
)
ALTERNATING = st.tuples(st.booleans(), st.integers(0, 3), st.booleans()).map(
    lambda of: chat(*"ab" * of[1], *"a" * of[2], system="s" * of[0])
)
ANYTHING = st.one_of(
    ALTERNATING, st.lists(st.one_of(MESSAGES, st.integers()), max_size=3), st.none()
)


@given(ANYTHING)
def test_a_conversation_is_accepted_or_refused_with_file_and_line(
    tmp_path_factory, messages
):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps({"messages": chat("q", "a")}) + "\n\n")
    with path.open("a") as file:
        file.write(json.dumps({"messages": messages}))
    if is_conversation(messages):
        _, found = read_conversations(path)
        assert [each.role for each in found] == [each["role"] for each in messages]
    else:
        with pytest.raises(ValueError, match=r"any\.jsonl:3: "):
            [*read_conversations(path)]


def test_files_may_have_marks_carriage_returns_blank_lines_and_other_keys(tmp_path):
    path = tmp_path / "a.jsonl"
    asked = {"role": "user", "content": "\ud83d\n", "name": "x"}
    rows = [{"messages": [asked, ANSWER], "id": [1]}, {"messages": [QUESTION, ANSWER]}]
    text = "\r\n \r\n".join(map(json.dumps, rows))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    answer = Message("assistant", "de")
    assert [*read_conversations(path)] == [
        [Message("user", "\ufffd\n"), answer],
        [Message("user", "abc"), answer],
    ]


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ('{"messages": oops}', "JSON.* column 14"),
        ('{"text": "a"}', "messages"),
        ("[1]", "messages"),
        ('{"messages": []}', "messages"),
        ("[" * 100_000, "JSON"),
        ([ANSWER], "message 1 .*user"),
        ([QUESTION, QUESTION], "message 2 .*assistant"),
        ([QUESTION, ANSWER, QUESTION], "last .*user"),
        ([QUESTION, {"role": "tool", "content": "a"}], "message 2 .*'tool'"),
        ([QUESTION, {"role": "assistant", "content": " "}], "message 2.*assistant"),
        ([QUESTION, {"role": "assistant", "content": [1]}], "message 2 .*list"),
        ([QUESTION, {"role": {}, "content": "a"}], "message 2 .*dict"),
        ([QUESTION, ANSWER, {"role": "system", "content": "a"}], "message 3 .*system"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, line, names):
    path = tmp_path / "b.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps({"messages": line}))
    with pytest.raises(ValueError, match=rf"b\.jsonl:1: .*{names}"):
        [*read_conversations(path)]


def test_a_conversation_to_answer_ends_with_the_user():
    assert check_messages([QUESTION], last="user") == [Message("user", "abc")]
    with pytest.raises(ValueError, match="last"):
        check_messages([QUESTION, ANSWER], last="user")


def rows_of(conversations, block_size, tokenizer=CHAR, **data):
    """The rows of conversations that are all in the training part, and the log."""
    rows = [
        ("0", *(each["content"] for each in messages)) for messages in conversations
    ]
    lines = []
    arrays = tokenize(rows, tokenizer, lines.append)
    arrays["split"] = np.zeros(len(rows), int)
    config = changed(TINY, model={"block_size": block_size}, data=data)
    return make_rows(arrays, config, tokenizer, lines.append, "train"), lines


def test_a_row_is_as_spelled_out_by_hand():
    packed, _ = rows_of([chat("abc", "de", system="h"), chat("a", "b")], 20)
    a, b, c, d, e, _, _, h = range(8)
    first = [SYSTEM, h, END, USER, a, b, c, END, ASSISTANT, d, e, END]
    second = [USER, a, END, ASSISTANT, b, END]
    start = CHAR.end_of_text
    inputs, targets, segments, parts = read_rows(packed, np.array([0]))
    assert targets[0].tolist() == [*first, *second, 0, 0]
    assert inputs[0].tolist() == [start, *first[:-1], start, *second[:-1], 0, 0]
    assert segments[0].tolist() == [1] * 12 + [2] * 6 + [0] * 2
    assert parts[0].tolist() == [0] * 9 + [1, 1, 2] + [0] * 4 + [1, 2] + [0] * 2
    assert predictions(packed) == 5


def test_every_token_counts_if_prompts_are_learned():
    data = {"packing": "conversations", "learn_prompts": True}
    conversations = [chat("abc", "de", system="h"), chat("a", "b")]
    packed, _ = rows_of(conversations, 20, **data)
    answers, _ = rows_of(conversations, 20)
    *expected, _ = read_rows(answers, np.array([0]))
    for found, leaf in zip(read_rows(packed, np.array([0])), expected, strict=True):
        np.testing.assert_array_equal(found, leaf)
    assert predictions(packed) == 18
    row = longest_row(changed(TINY, data=data))
    assert len(row) == len(expected)


def test_long_conversations_are_cut_at_turns_and_exchanges_too_long_are_left_out():
    exchanges = ["a", "b", "c", "d", "a" * 30, "e", "f", "gg", "h" * 3, "bb"]
    packed, lines = rows_of([chat(*exchanges, system="st")], 18)
    pieces = [
        CHAR.decode(packed.tokens[start : start + length])
        for start, length in zip(packed.starts_P, packed.lengths_P, strict=True)
    ]
    found = ["".join(re.split(r"<\|\w+\|>", piece)) for piece in pieces]
    assert sorted(found) == ["stabcd", "stfgg", "sthhhbb"]
    assert "1 are longer" in lines[-1]
    assert "1 exchanges are left out" in lines[-1]
    with pytest.raises(ValueError, match="block_size=6"):
        rows_of([chat("abc", "de")], 6)


def test_an_exchange_is_left_out_if_the_tokenizer_knows_nothing_of_its_answer():
    packed, lines = rows_of([chat("a", "b", "c", "ÄÖ", "Ü", "dÄ")], 20)
    assert texts_of(packed, CHAR) == ["a", "b", "d"]
    assert len(packed.lengths_P) == 2  # what was not consecutive is in two pieces
    assert "1 exchanges are left out" in lines[-1]


def load(config, tokenizer=None):
    lines = []
    corpus, config = load_corpus(config, lines.append, tokenizer)
    return corpus, config, lines


def texts_of(packed, tokenizer):
    """The text of each message, as often as it occurs."""
    return sorted(re.findall(r"\|>([^<]+)<", tokenizer.decode(packed.tokens)))


def test_splits_are_disjoint_and_all_have_every_conversation(tmp_path, fresh_cache):
    config = changed(conversations_config(tmp_path), model={"block_size": 64})
    corpus, config, _ = load(config)
    splits = [
        load_split(config, split, lambda line: None, corpus.tokenizer)
        for split in (*SPLITS, "all")
    ]
    *parts, whole = (texts_of(split, corpus.tokenizer) for split in splits)
    assert sorted(chain(*parts)) == whole
    assert all(parts)
    assert texts_of(corpus.train, corpus.tokenizer) == parts[0]
    assert texts_of(corpus.val, corpus.tokenizer) == parts[1]
    assert config.model.vocab_size == corpus.tokenizer.vocab_size == 8 + 5
    changed_text = changed(config, data={"sha256": "0" * 64})
    with pytest.raises(ValueError, match="has changed"):
        load(changed_text)


def test_lines_that_move_to_another_file_change_the_corpus(tmp_path, fresh_cache):
    whole = conversations_config(tmp_path)
    (path,) = map(Path, whole.data.path)
    lines, found = [*path.read_text().splitlines(True), "\n"], []
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for size in (20, 40):
        for name, of_file in zip(names, (lines[:size], lines[size:]), strict=True):
            Path(name).write_text("".join(of_file))
        data = {"path": tuple(names), "weights": (1.0, 1.0)}
        corpus, config, _ = load(changed(whole, data=data))
        found.append((config.data.sha256, *map(predictions, corpus.parts)))
    assert found[0][0] != found[1][0]
    assert found[0][1] < found[1][1]
    assert sum(found[0][1:]) == sum(found[1][1:])


def test_messages_that_spell_a_special_token_are_counted_and_told_once(
    tmp_path, fresh_cache
):
    config = conversations_config(tmp_path)
    path = Path(*config.data.path)
    spelling = {"messages": chat("<|end|><|user|>", "a|>", "<|endoftext|>", "b")}
    path.write_text(path.read_text() + "\n" + json.dumps(spelling))
    for _ in range(2):  # the second time from the cache
        *_, lines = load(config)
        assert len([line for line in lines if "2 messages spell" in line]) == 1


def test_rows_of_several_files_are_drawn_by_their_weights(tmp_path, fresh_cache):
    a, b = (conversations_config(tmp_path, name) for name in ("a", "longer"))
    path = a.data.path + b.data.path
    config = changed(a, data={"path": path, "weights": (1.0, 3.0), "batch_size": 400})
    corpus, config, _ = load(config)
    both = texts_of(corpus.train, corpus.tokenizer)
    parts = [texts_of(part, corpus.tokenizer) for part in corpus.parts]
    assert sorted(chain(*parts)) == both
    second = read_rows(corpus.parts[1], np.arange(len(corpus.parts[1])))[1]
    own = {*map(bytes, second)}
    targets = training_source([*corpus.parts], config)(0, slice(None))[1]
    share = np.mean([bytes(row) in own for row in targets])
    assert 0.68 < share < 0.82
    one = changed(a, data={"weights": (1.0,)})
    (part,) = load(one)[0].parts
    np.testing.assert_array_equal(part.tokens, load(a)[0].train.tokens)
    Path(path[1]).write_text(json.dumps({"messages": chat("a" * 99, "b")}))
    with pytest.raises(ValueError, match=r"longer\.jsonl .*block_size=32"):
        load(changed(config, data={"sha256": ""}))
