import json

import pytest

from jaxgpt.text import chitchat
from jaxgpt.text.chitchat import find_conversations, to_jsonl
from jaxgpt.text.conversations import read_conversations


def said(*messages):
    """A conversation as the package has it: turns of messages by "a" or "b"."""
    turns = [[{"sender": each[0], "text": each[1:]} for each in messages]]
    return {"messages": turns}


def test_who_writes_first_is_the_user_and_what_follows_at_once_is_one_message():
    dataset = {
        "1": said("aHi", "a  you \n", "b ", "bHello", "aSo?", "bWell", "aBye"),
        "2": said("aNobody?"),
        "3": said("aHi you", "bHello", "aSo?", "bWell", "aBye"),  # equals the first
    }
    (line,) = to_jsonl(dataset).decode().splitlines()
    assert json.loads(line)["messages"] == [
        {"role": "user", "content": "Hi you"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "Well"},
    ]


def test_they_are_the_conversations_of_the_package_and_are_fetched_once(
    fresh_cache, monkeypatch
):
    path = find_conversations(lambda line: None)
    messages = [*map(len, read_conversations(path))]
    assert (len(messages), sum(messages)) == (4_013, 133_676)
    monkeypatch.setattr(chitchat, "read_wheel", None)
    assert find_conversations(lambda line: None) == path


def test_other_conversations_than_those_are_refused(fresh_cache, monkeypatch):
    dataset = json.dumps({"1": said("aHi", "bHello")}).encode()
    monkeypatch.setattr(chitchat, "read_wheel", lambda *of: [dataset])
    with pytest.raises(OSError, match="sha256"):
        find_conversations(lambda line: None)
    assert not [*fresh_cache.glob("chitchat*")]
