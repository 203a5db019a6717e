import os
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import CharTokenizer
from jaxgpt.text import shards
from jaxgpt.text.shards import Manifest, Shard, Tokens, open_folder
from jaxgpt.text.textfiles import read_texts, tokenize
from jaxgpt.text.tokenizer import END_OF_TEXT

SETTINGS = {"vocab_size": 50_257, "end_of_text": 50_256, "sources": []}
SETTINGS |= {"settings": {}, "tokenizer": "", "documents": 1, "duplicates": 0}
ARRAYS = st.lists(
    st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5
).filter(any)


def split_into(pieces):
    return Tokens([np.array(piece, np.uint16) for piece in pieces])


@given(ARRAYS, st.data())
def test_many_arrays_read_as_their_concatenation(pieces, data):
    tokens, whole = split_into(pieces), np.array([*chain(*pieces)], np.uint16)
    assert len(tokens) == len(whole)
    positions = st.integers(0, len(whole) - 1)
    width = data.draw(st.integers(1, 4))
    rows = st.lists(st.lists(positions, min_size=width, max_size=width))
    for index in (
        data.draw(st.slices(len(whole))),
        np.array(data.draw(st.lists(positions)), int),
        np.array(data.draw(rows), int).reshape(-1, width),
    ):
        np.testing.assert_array_equal(tokens[index], whole[index])
        assert tokens[index].dtype == whole.dtype


def test_positions_outside_are_refused():
    tokens = split_into([[1, 2], [3]])
    for index in ([-1], [3], [[0, 1], [2, 3]]):
        with pytest.raises(IndexError):
            tokens[np.array(index)]


def test_documents_end_where_they_are_known_to_or_at_the_token():
    first, last = np.array([5, 9, 9]), np.array([7, 9, 8])
    for ends in (None, [np.array([2, 3]), None]):
        tokens = Tokens.join([Tokens([first, last], ends), Tokens([last[:0], last])])
        assert tokens.document_ends(9).tolist() == [2, 3, 5, 6, 8, 9]
    assert split_into([[], []]).document_ends(9).tolist() == []


@pytest.fixture
def folder(tmp_path):
    """A prepared folder of 300 GB, of holes, that says that its largest token is 41."""
    found = []
    for n, name in enumerate(["train_000.bin", "train_001.bin", "val_000.bin"]):
        found.append(Shard(name, 50_000_000_000 + n, n + 1, 41, ""))
        for path, size in (
            (name, 2 * found[-1].tokens),
            (found[-1].ends_name, 4 * n + 4),
        ):
            (tmp_path / path).touch()
            os.truncate(tmp_path / path, size)
    Manifest(shards=found, **SETTINGS).save(tmp_path)
    return tmp_path


def test_a_prepared_folder_is_opened_without_reading_its_tokens(folder):
    splits, _ = open_folder(folder, 50_257)
    assert (len(splits["train"]), len(splits["val"])) == (
        100_000_000_001,
        50_000_000_002,
    )
    assert splits["train"][49_999_999_999:50_000_000_001].tolist() == [0, 0]


def test_what_the_manifest_says_of_the_shards_is_checked(folder):
    with pytest.raises(ValueError, match=r"train_000\.bin has token 41\b"):
        open_folder(folder, 41)
    (folder / "tokenizer.json").touch()  # of another vocabulary
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        open_folder(folder, 50_257)
    (folder / "tokenizer.json").unlink()
    splits, _ = open_folder(folder, 50_257)
    with pytest.raises(ValueError, match=r"train_001\.ends"):  # which are all 0
        splits["train"].document_ends(50_256)
    os.truncate(folder / "val_000.ends", 0)
    with pytest.raises(ValueError, match=r"val_000\.bin"):
        open_folder(folder, 50_257)
    (folder / "train_001.ends").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_001\.ends"):
        open_folder(folder, 50_257)


def test_its_sha256_is_that_of_the_manifest_which_has_no_dates(folder):
    _, before = open_folder(folder, 50_257)
    content = (folder / "manifest.json").read_bytes()
    Manifest.load(folder).save(folder)
    assert (folder / "manifest.json").read_bytes() == content
    assert open_folder(folder, 50_257)[1] == before


def test_the_error_of_a_folder_without_its_validation_says_what_it_needs(tmp_path):
    (tmp_path / "train.bin").write_bytes(bytes(8))
    with pytest.raises(FileNotFoundError, match=r"val\.bin is .* train\.bin and val"):
        open_folder(tmp_path, 9)


def test_a_manifest_of_a_newer_version_or_a_damaged_one_is_refused(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    for damaged in (text.replace('"format": 1', '"format": 2'), text[:99], "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            open_folder(folder, 50_257)


def test_nanogpts_files_are_scanned_again_only_if_one_changes(
    tmp_path, fresh_cache, monkeypatch
):
    scans = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda arrays: scans.append(1) or scan(arrays))
    monkeypatch.setattr(shards, "_CHUNK", 7)
    ids = np.arange(40, dtype=np.uint16)
    for name in ("train.bin", "val.bin"):
        ids.tofile(tmp_path / name)

    def open_at(time):
        os.utime(tmp_path / "val.bin", (time, time))
        return open_folder(tmp_path, 40)[1]

    os.utime(tmp_path / "train.bin", (1, 1))
    assert len({open_at(1), open_at(1)}) == len(scans) == 1
    ids[::-1].tofile(tmp_path / "val.bin")  # of the same size
    assert len({open_at(1), open_at(2)}) == len(scans) == 2
    with pytest.raises(ValueError, match=r"train\.bin has token 39\b"):
        open_folder(tmp_path, 39)
    assert len(scans) == 2
    (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes())
    for _ in range(2):  # it could change again at the same time
        open_folder(tmp_path, 40)
    assert len(scans) == 4


@pytest.mark.parametrize("kind", ["nanogpt", "text"])
def test_ends_of_documents_are_looked_for_once(
    kind, tmp_path, fresh_cache, monkeypatch
):
    def find():
        if kind == "text":
            text = read_texts("texts", sorted(tmp_path.glob("*.txt")))
            tokenizer = CharTokenizer("ab", [END_OF_TEXT])
            tokens = tokenize(text, tokenizer, ["all"], lambda line: None)["all"]
        else:
            tokens = open_folder(tmp_path, 3)[0]["train"]
        for path in [*tmp_path.iterdir(), *fresh_cache.glob("tokens/*/*")]:
            os.utime(path, (1, 1))  # what is new could change at the same time
        return tokens.document_ends(2)

    monkeypatch.setattr(shards, "_CHUNK", 3)
    for name, ids in {"train": [0, 2, 1, 0, 0, 2, 2, 1], "val": [2]}.items():
        np.array(ids, np.uint16).tofile(tmp_path / f"{name}.bin")
    for n, content in enumerate(["a", "baa", "b"]):
        (tmp_path / f"{n}.txt").write_text(content)
    expected = {"nanogpt": [2, 6, 7, 8], "text": [2, 6, 8]}[kind]
    scans, scan = [], shards._scan_ends
    monkeypatch.setattr(shards, "_scan_ends", lambda *a: scans.append(1) or scan(*a))
    for _ in range(2):
        assert find().tolist() == expected
    assert len(scans) == 1
