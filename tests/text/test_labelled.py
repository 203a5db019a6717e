import json

import numpy as np
import pytest

from jaxgpt import CharTokenizer
from jaxgpt.text.labelled import encode_pieces, encode_texts, read_labelled
from jaxgpt.text.tokenizer import END_OF_TEXT

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz", [END_OF_TEXT])
END = LETTERS.end_of_text


def read(tmp_path, name, content, needs_label=True, log=lambda line: None):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_labelled([path], needs_label, name, log)


def test_csv_and_jsonl_give_texts_and_labels_as_they_are_written(tmp_path):
    csv = '\ufefftext,label,source\r\n"a, ""b""\nc",1.0,web\r\nd,01,\r\n'
    expected = [('a, "b"\nc', "1.0", "web"), ("d", "01", "")]
    assert read(tmp_path, "a.csv", csv) == expected
    lines = ['{"text": "a, \\"b\\"\\nc", "label": 1.0, "source": "web"}', ""]
    lines.append('{"label": "01", "text": "d", "other": [1]}')
    assert read(tmp_path, "a.jsonl", "\n".join(lines)) == expected


def test_whitespace_around_a_label_is_no_part_of_it(tmp_path):
    expected = [("a", "pos", ""), (" b", "pos", "")]
    assert read(tmp_path, "a.csv", "text,label\na,  pos\n b,pos \n") == expected
    lines = ['{"text": "a", "label": "\\tpos"}', '{"text": " b", "label": "pos "}']
    assert read(tmp_path, "a.jsonl", "\n".join(lines)) == expected


def test_without_labels_only_the_text_counts(tmp_path):
    assert read(tmp_path, "a.csv", "id,text\n1,x\n", needs_label=False) == [("x",)]
    line = json.dumps({"text": "x" * 200_000})  # csv's default limit is 131,072
    assert read(tmp_path, "a.jsonl", line, needs_label=False)[0][0] == "x" * 200_000
    csv = "text\n" + "x" * 200_000
    assert read(tmp_path, "a.csv", csv, needs_label=False)[0][0] == "x" * 200_000


def test_texts_of_only_whitespace_are_left_out_and_counted(tmp_path):
    lines = []
    rows = read(tmp_path, "a.csv", 'text,label\n" ",1\nx,2\n', log=lines.append)
    assert rows == [("x", "2", "")]
    assert "1 of 2" in lines[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;label\nx;1\n", r"a\.csv: .*text;label"),
        ("a.csv", "text,label,label\nx,1,2\n", r"a\.csv: .*once"),
        ("a.csv", 'text,label\nx,"1\n2"\n', r"a\.csv:2: .*label"),
        ("a.csv", "text,label\nx,1\ny\n", r"a\.csv:3: "),
        ("a.csv", "text,label\nx,y,1\n", r"a\.csv:2: "),
        ("a.csv", "text,label\nx,\n", r"a\.csv:2: .*label"),
        ("a.csv", "text,label\nx, \n", r"a\.csv:2: .*label"),
        ("a.jsonl", '\n{"text": "x", "label": " "}', r"a\.jsonl:2: .*label"),
        ("a.csv", 'text,label\n"x,1\n', r"a\.csv:\d: "),
        ("a.csv", "text,label\n", "empty"),
        ("a.csv", "text,label\nä,1\n".encode("latin-1"), r"a\.csv .*iconv"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}', r"a\.jsonl:2: .*label"),
        ("a.jsonl", '{"text": "x", "label": null}', r'a\.jsonl:1: .* its "label"'),
        ("a.jsonl", '{"text": "x", "label": NaN}', r'a\.jsonl:1: .* its "label"'),
        ("a.jsonl", '["text", "label"]', r"a\.jsonl:1: "),
        ("a.jsonl", "{", r"a\.jsonl:1: "),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_line(
    tmp_path, name, content, message
):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, name, content)


def test_of_a_long_text_the_first_and_last_half_are_kept():
    lines = []
    texts = encode_texts(["abcdefgh", "abcdefg", ""], LETTERS, 8, lines.append)
    assert [LETTERS.decode(ids[1:]) for ids in texts] == ["abcdfgh", "abcdefg", ""]
    assert [ids[0] for ids in texts] == [END] * 3
    assert "1 of 3" in lines[0]


def test_a_long_text_becomes_pieces_without_a_gap():
    lines, texts = [], ["abcdefghij", "", "abc"]
    pieces, of_text = encode_pieces(texts, LETTERS, 5, lines.append)
    assert "1 of 3" in lines[0]
    assert [LETTERS.decode(ids[1:]) for ids in pieces] == [
        *("abcd", "efg", "hij"),
        *("", "abc"),
    ]
    assert [ids[0] for ids in pieces] == [END] * 5
    np.testing.assert_array_equal(of_text, [0, 0, 0, 1, 2])
