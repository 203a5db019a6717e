import gzip
import json
import os
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from jaxgpt.text import documents
from jaxgpt.text.documents import find_files, find_inputs, is_records, parse

TEXTS = [f"tale {n}\nwith é 🙂 and " + "words " * n for n in range(40)]


def jsonl(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)


def compress(path, content):
    with pyarrow.output_stream(path, compression="detect") as file:
        file.write(content)


def write(path, texts=TEXTS):
    """Writes texts in the format that the suffixes of the path name."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        parquet.write_table(table, path, row_group_size=9)
    else:
        compress(path, jsonl(texts).encode())
    return str(path)


def read(*inputs, start=documents.START, field="text"):
    """The documents of the inputs, and the positions of their blocks' ends."""
    found, ends = [], []
    for block in documents.read_blocks(find_inputs(inputs), field, start):
        found += parse(block)
        ends.append((block.end, len(found)))
    return found, ends


def texts_of(*inputs, **options):
    found, _ = read(*inputs, **options)
    assert not [document for document in found if document.problem]
    return [document.text for document in found]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 300)
    monkeypatch.setattr(documents, "_BATCH_ROWS", 2)


FORMATS = ["a.jsonl", "a.NDJSON", "a.json.gz", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_from_any_block_on(tmp_path, name):
    path = write(tmp_path / name)
    assert is_records(Path(path))
    found, ends = read(path)
    assert [document.text for document in found] == TEXTS
    assert len(ends) > 5
    for end, count in ends[::3]:
        assert read(path, start=end)[0] == found[count:]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst", ""])
def test_a_text_file_is_a_document(tmp_path, suffix):
    for n, text in enumerate(TEXTS):
        compress(path := tmp_path / f"{n:02d}{suffix}", text.encode())
        assert not is_records(path)
    assert texts_of(str(tmp_path / "*")) == TEXTS
    _, ends = read(str(tmp_path / "*"))
    for end, count in ends[::3]:
        assert texts_of(str(tmp_path / "*"), start=end) == TEXTS[count:]


def test_a_mark_carriage_returns_and_blank_lines_are_no_text(tmp_path):
    content = "\ufeff" + jsonl(["a", "b"]).replace("\n", "\r\n\r\n \n") + jsonl(["c"])
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.rstrip().encode())
    assert texts_of(str(path)) == ["a", "b", "c"]
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffa\r\n\n".encode())
    assert texts_of(str(text)) == ["a\r\n\n"]


def test_compressed_files_may_be_concatenated(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    parts = [gzip.compress(jsonl(texts).encode()) for texts in (["a"], ["b", "c"])]
    path.write_bytes(b"".join(parts))
    assert texts_of(str(path)) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_text_may_have_any_type_of_text_in_parquet(tmp_path, kind):
    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    kind = types.get(kind) or getattr(pyarrow, kind)()
    column = pyarrow.array(["é", "b"]).cast(kind)
    parquet.write_table(pyarrow.table({"body": column}), tmp_path / "a.parquet")
    assert texts_of(str(tmp_path / "a.parquet"), field="body") == ["é", "b"]


def test_unpaired_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b \ud83d\ude00"}')
    assert texts_of(str(tmp_path / "a.jsonl")) == ["a\ufffdb 😀"]


BROKEN = {
    "a.jsonl": {
        b'{"text": "\xe9"}': "not UTF-8",
        b'{"text": "a"': "broken JSON",
        b"[" * 100_000: "broken JSON",
        b"NaN": "no text",
        b'{"txt": "a"}': "no text",
        b'{"text": null}': "no text",
        b'{"text": ""}': "empty",
    },
    "a.parquet": {b"\xe9": "not UTF-8", None: "no text", b"": "empty"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_document_that_is_no_text_is_told_with_its_line_or_row(tmp_path, name):
    path = tmp_path / name
    values = [b'{"text": "before"}' if name == "a.jsonl" else b"before", *BROKEN[name]]
    if name == "a.jsonl":
        path.write_bytes(b"\n".join(values))
    else:
        parquet.write_table(pyarrow.table({"text": values}), path)
    found, _ = read(str(path))
    assert [document.problem for document in found] == ["", *BROKEN[name].values()]
    place = f"{path}:{{}}" if name == "a.jsonl" else f"{path}, row {{}}"
    assert [d.where for d in found] == [place.format(n + 1) for n in range(len(found))]


@pytest.mark.parametrize("name", FORMATS[2:])
@pytest.mark.parametrize("cut", [0.6, -4])
def test_a_truncated_file_gives_what_can_be_read_and_a_problem(tmp_path, name, cut):
    texts = [random.Random(n).randbytes(9_000).hex() for n in range(30)]
    path = Path(write(tmp_path / name, texts))
    size = path.stat().st_size
    os.truncate(path, size + cut if cut < 0 else int(cut * size))
    found, ends = read(str(path), write(tmp_path / "b.jsonl", ["next"]))
    (problem,) = (document for document in found if document.problem)
    before = found[: found.index(problem)]
    assert problem.problem == "unreadable"
    assert problem.where.startswith(str(path))
    assert [document.text for document in before] == texts[: len(before)]
    assert bool(before) == (name != "a.parquet")  # whose index is at its end
    assert found[-1].text == "next"
    for end, count in ends[::8]:
        assert read(str(path), str(tmp_path / "b.jsonl"), start=end)[0] == found[count:]


@pytest.mark.parametrize("name", FORMATS[2:])
def test_a_damaged_file_gives_the_same_documents_from_any_block_on(tmp_path, name):
    texts = [random.Random(n).randbytes(9).hex() for n in range(20_000)]
    path = tmp_path / name
    write(path, texts)
    middle = path.stat().st_size // 2
    if name == "a.parquet":  # of many pages; its index, at the end, stays whole
        options = {"data_page_size": 1000, "write_batch_size": 10}
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, path, use_dictionary=False, **options)
        with path.open("r+b") as file:
            file.seek(middle := path.stat().st_size // 2)
            file.write(b"\xff" * 2000)
    else:
        os.truncate(path, middle)
    found, ends = read(str(path))
    assert found[-1].problem == "unreadable"
    assert 3_000 < len(found) < 12_000
    for end, count in ends[:: len(ends) // 20]:
        assert read(str(path), start=end)[0] == found[count:]


def test_a_column_without_text_makes_a_file_unreadable(tmp_path):
    table = pyarrow.table({"text": [1], "texts": [["a"]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    for field in ("text", "texts", "body"):
        (document,), _ = read(str(tmp_path / "a.parquet"), field=field)
        assert document.problem == "unreadable"
        assert repr(field) in document.detail


def test_files_come_from_folders_patterns_and_names_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.jsonl", "c/d.PARQUET", "c/e.txt.gz", "c/f.jsonl.zst"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for name in ("c/.hidden.txt", "c/notes.md", ".git/g.txt", "c/x.gz", "c/x.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    inside = ["c/d.PARQUET", "c/e.txt.gz", "c/f.jsonl.zst"]
    names = [str(path) for path in find_files(["b.txt", "."])]
    assert names == ["b.txt", "a.jsonl", "b.txt", *inside]
    assert [str(path) for path in find_files(["c/*.json"])] == ["c/x.json"]
    assert [str(path) for path in find_files(["c/*.md", "?.*"])] == [
        *("c/notes.md", "a.jsonl", "b.txt")
    ]
    here = tmp_path.name
    assert [file.name for file in find_inputs([".", "c/x.gz"])] == [
        *(f"{here}/{name}" for name in ["a.jsonl", "b.txt", *inside]),
        "x.gz",
    ]
    left_out = find_inputs(["*.jsonl", "**/*.txt*"], without=[tmp_path / "c"])
    assert [file.name for file in left_out] == ["a.jsonl", "b.txt"]


def test_an_input_without_files_is_named(tmp_path):
    (tmp_path / "notes.md").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "*.txt"):
        with pytest.raises(FileNotFoundError, match=path.name.replace("*", r"\*")):
            find_files([str(path)])
    with pytest.raises(FileNotFoundError):
        find_files([])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        find_files([str(tmp_path / "pipe")])
