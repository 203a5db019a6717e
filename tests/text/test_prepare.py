import hashlib
import json
import os
import random
import shutil
import time
from contextlib import contextmanager, suppress
from errno import ENOSPC
from functools import partial

import numpy as np
import pytest
import tokenizers
from conftest import ROOT, contents, finish, start_script
from hypothesis import assume, given
from hypothesis import strategies as st
from test_documents import write
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.run import fcntl
from jaxgpt.text import documents, passes, prepare
from jaxgpt.text.pretrained import gpt2_tokenizer
from jaxgpt.text.shards import Manifest, open_folder
from jaxgpt.text.tokenizer import END_OF_TEXT, load_tokenizer

FULL = OSError(ENOSPC, "full")
TEXTS = [f"tale {n}: " + "é, not 🙂. " * (n % 7) + "\n" for n in range(150)]


def in_this_process(function, tasks, workers):
    return (function(task) for task in tasks)


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch):
    monkeypatch.setattr(prepare, "ordered_map", in_this_process)
    monkeypatch.setattr(documents, "_BLOCK", 1000)
    monkeypatch.setattr(prepare, "_SAVE_SECONDS", -1)  # after each block
    monkeypatch.setattr(os, "fsync", lambda file: None)


def call(inputs, folder, tokenizer="char", log=lambda line: None, **options):
    inputs = [str(path) for path in np.atleast_1d(inputs)]
    passes._load.cache_clear()  # which a process needs for one folder only
    options = {"val_fraction": 0.2} | options
    return prepare.prepare(inputs, folder, tokenizer=tokenizer, log=log, **options)


def is_val(text):
    first = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    return first < 0.2 * 2**64


def read(folder):
    """The texts of each split, as the shards have them."""
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    found = {}
    for split, tokens in open_folder(folder, manifest.vocab_size)[0].items():
        texts = tokenizer.decode(tokens[:].tolist()).split(END_OF_TEXT)
        assert texts.pop() == ""
        assert len(tokens.document_ends(manifest.end_of_text)) == len(texts)
        found[split] = texts
    return found


def bytes_of(folder):
    """Whatever a finished folder has."""
    found = contents(folder)
    assert found.pop("lock") == b""
    assert not any(name.startswith("unfinished") for name in found)
    return found


@pytest.fixture
def data(tmp_path):
    """The texts in files of several kinds, in order."""
    (folder := tmp_path / "data").mkdir()
    write(folder / "a.jsonl", TEXTS[:60])
    for n, text in enumerate(TEXTS[60:80]):
        (folder / f"b{n:02d}.txt").write_text(text)
    write(folder / "c.jsonl.zst", TEXTS[80:120])
    write(folder / "d.parquet", TEXTS[120:])
    return folder


def test_documents_go_to_the_split_of_their_hash_in_order(data, tmp_path):
    manifest = call(data, tmp_path / "out")
    expected = {
        "train": [text for text in TEXTS if not is_val(text)],
        "val": [text for text in TEXTS if is_val(text)],
    }
    assert read(tmp_path / "out") == expected
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.documents == len(TEXTS)
    assert [shard.documents for shard in manifest.shards] == [
        len(texts) for texts in expected.values()
    ]
    sources = {source.pop("name"): source for source in manifest.sources}
    names = ["data/a.jsonl", *(f"data/b{n:02d}.txt" for n in range(20))]
    assert list(sources) == [*names, "data/c.jsonl.zst", "data/d.parquet"]
    content = (data / "c.jsonl.zst").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    counts = {"documents": 40, "skipped": 0}
    assert sources["data/c.jsonl.zst"] == counts | {
        "bytes": len(content),
        "sha256": sha256,
    }


def test_added_files_move_no_document_to_another_split(data, tmp_path):
    call(data, tmp_path / "before")
    write(data / "0.jsonl", [f"new {n}" for n in range(50)])
    call(data, tmp_path / "after")
    before, after = read(tmp_path / "before"), read(tmp_path / "after")
    for split in before:
        new = [text for text in after[split] if not text.startswith("new")]
        assert new == before[split]
        assert len(after[split]) > len(new)


def test_a_shard_is_closed_at_the_first_end_of_a_document_that_fills_it(data, tmp_path):
    one = call(data, tmp_path / "one")
    many = call(data, tmp_path / "many", shard_tokens=500)
    assert read(tmp_path / "one") == read(tmp_path / "many")
    for split, size in (("train", 6), ("val", 2)):
        *full, last = many.split(split)
        assert len(full) + 1 > size
        names = [shard.name for shard in many.split(split)]
        assert names == [f"{split}_{n:03d}.bin" for n in range(len(names))]
        for shard in [*full, last]:
            ends = np.fromfile(tmp_path / "many" / shard.ends_name, "<u4")
            content = (tmp_path / "many" / shard.name).read_bytes()
            assert shard.sha256 == hashlib.sha256(content).hexdigest()
            assert len(content) == 2 * shard.tokens == 2 * ends[-1]
            assert shard.largest_token == one.end_of_text
            assert (ends < 500).sum() == len(ends) - (shard in full)


def test_the_bytes_do_not_depend_on_the_number_of_workers(data, tmp_path, monkeypatch):
    call(data, tmp_path / "here", dedup=True)
    monkeypatch.undo()
    for workers in (1, 2):
        call(data, tmp_path / str(workers), dedup=True, workers=workers)
        assert bytes_of(tmp_path / str(workers)) == bytes_of(tmp_path / "here")


def interrupt(patch, owner, name, after, error=FULL):
    """Makes a function fail at a call, as if the disk were full; returns its calls."""
    original, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > after:
            if name == "append":
                _, folder, file, content = arguments
                with (folder / file).open("ab") as half:
                    half.write(content[: len(content) // 2])
            raise error
        return original(*arguments, **options)

    patch.setattr(owner, name, failing)
    return calls


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (prepare._State, "append"),
        (prepare._State, "save"),
        (prepare, "_close"),
        (os, "replace"),
        (Manifest, "save"),
        (prepare, "delete"),
    ],
)
def test_a_full_disk_at_any_moment_changes_no_byte_of_the_result(
    data, tmp_path, owner, name
):
    options = {"shard_tokens": 2000, "dedup": True, "on_error": "skip"}
    write(data / "e.jsonl", [TEXTS[3], "", "last"])
    call(data, tmp_path / "whole", **options)
    moments = 0
    while True:
        out = tmp_path / f"{moments}"
        with pytest.MonkeyPatch.context() as patch:
            calls = interrupt(patch, owner, name, moments)
            with suppress(OSError):
                call(data, out, **options)
        if len(calls) <= moments:
            break
        call(data, out, **options)
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
        moments += 1 + moments // 5
    assert moments


def test_another_error_than_a_documents_changes_no_byte_of_the_result(data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, prepare, "_write", 7, ValueError("not of a document"))
        patch.setattr(prepare, "_SAVE_SECONDS", 99)
        with pytest.raises(ValueError, match="not of a document"):
            call(data, tmp_path / "out")
    call(data, tmp_path / "out")
    call(data, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_run_of_other_settings_that_is_killed_leaves_no_mixture(data, tmp_path):
    out, calls = tmp_path / "out", []
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, Manifest, "save", 0)
        with pytest.raises(OSError, match="full"):
            call(data, out, shard_tokens=1000)
    with pytest.MonkeyPatch.context() as patch:
        calls = interrupt(patch, prepare, "delete", 1)
        with pytest.raises(OSError, match="full"):
            call(data, out, shard_tokens=1001)
    assert calls[0][0].parent == out  # a file that the first had moved
    call(data, out, shard_tokens=1000)
    call(data, tmp_path / "whole", shard_tokens=1000)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_the_folder_may_be_within_the_input(data, tmp_path, monkeypatch):
    for inputs in (data, data / "**" / "*.*"):
        out = data / f"out{len(str(inputs))}"
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, Manifest, "save", 0)
            with pytest.raises(OSError, match="full"):
                call(inputs, out)
        lines = []
        manifest = call(inputs, out, log=lines.append)
        assert any("going on" in line for line in lines)
        assert call(inputs, out) == manifest
        assert manifest.documents == len(TEXTS)
        shutil.rmtree(out)


def test_a_file_that_several_inputs_name_is_read_once_at_its_first_place(
    data, tmp_path
):
    (tmp_path / "link.jsonl").symlink_to(data / "a.jsonl")
    inputs = [tmp_path / "link.jsonl", data / "*.zst", data, data / ".." / "data"]
    manifest = call(inputs, tmp_path / "out")
    names = [source["name"] for source in manifest.sources]
    assert names[:4] == ["a.jsonl", "c.jsonl.zst", "data/b00.txt", "data/b01.txt"]
    assert manifest.documents == len(TEXTS)


def test_the_progress_ends_at_its_total_from_any_block_on(data, tmp_path, monkeypatch):
    shown = []

    @contextmanager
    def progress(label, total, note=str):
        amounts = []
        shown.append((total, amounts))
        yield amounts.append

    monkeypatch.setattr(prepare, "progress", progress)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, prepare, "_add", 4)
        with pytest.raises(OSError, match="full"):
            call(data, tmp_path / "out")
    call(data, tmp_path / "out")
    size = sum(path.stat().st_size for path in data.iterdir())
    (finding, amounts), (tokenizing, before), (going_on, after) = shown
    assert finding == tokenizing == sum(amounts) == size
    assert going_on == sum(after) == size - sum(before)
    assert min(amounts) >= 0
    assert min(before) > 0


def test_a_file_that_vanishes_is_skipped(data, tmp_path, monkeypatch):
    def read_blocks(*arguments):
        for name in ("a.jsonl", "b03.txt"):
            (data / name).unlink(missing_ok=True)
        return documents.read_blocks(*arguments)

    monkeypatch.setattr(prepare, "read_blocks", read_blocks)
    manifest = call(data, tmp_path / "out", on_error="skip")
    assert manifest.documents == len(TEXTS) - 61
    unread = [each["name"] for each in manifest.sources if not each["sha256"]]
    assert unread == ["data/a.jsonl", "data/b03.txt"]


def test_the_first_bad_document_stops_and_the_same_command_with_skip_goes_on(
    data, tmp_path
):
    with (data / "a.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": 1}\n')
    (data / "b03.txt").write_bytes(b"\xe9")
    own = tmp_path / "tokenizer.json"
    CharTokenizer("".join(sorted({*"".join(TEXTS)})), [END_OF_TEXT]).save(own)
    call_with = partial(call, data, tokenizer=str(own))
    out, lines = tmp_path / "out", []
    with pytest.raises(ValueError, match=r"a\.jsonl:61: empty.*--on-error skip"):
        call_with(out, log=lines.append)
    assert not (out / "manifest.json").exists()
    manifest = call_with(out, on_error="skip", log=lines.append)
    assert any("going on" in line for line in lines)
    told = [line for line in lines if "skipped" in line]
    assert [line.split("data/")[1].split(" ")[0] for line in told] == [
        *("a.jsonl:61", "a.jsonl:62", "b03.txt")
    ]
    assert manifest.documents == 149
    skipped = {source["name"]: source["skipped"] for source in manifest.sources}
    assert sum(skipped.values()) == skipped["data/a.jsonl"] + 1 == 3
    call_with(tmp_path / "whole", on_error="skip")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_dedup_keeps_the_first_of_equal_documents(data, tmp_path):
    write(data / "z.jsonl", [*TEXTS[::-1], "new", "new"])
    lines = []
    manifest = call(data, tmp_path / "out", dedup=True, log=lines.append)
    assert manifest.documents == 151
    assert manifest.duplicates == 151
    call(data, tmp_path / "again")
    train, val = (
        list(dict.fromkeys(texts)) for texts in read(tmp_path / "again").values()
    )
    assert read(tmp_path / "out") == {"train": train, "val": val}
    assert any("index of 151 documents" in line for line in lines)


def test_a_finished_folder_is_not_made_again_and_not_overwritten(
    data, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    manifest = call(data, out)
    before = bytes_of(out)
    monkeypatch.setattr(prepare, "ordered_map", None)
    assert call(data, out) == manifest
    for options in ({"val_fraction": 0.3}, {"tokenizer": "gpt2"}, {"dedup": True}):
        with pytest.raises(FileExistsError, match=next(iter(options)).split("_")[0]):
            call(data, out, **options)
    text = (data / "b00.txt").read_text()
    (data / "b00.txt").write_text(text.upper())
    with pytest.raises(FileExistsError, match="input files"):
        call(data, out)
    assert bytes_of(out) == before


@pytest.mark.parametrize("change", ["settings", "sources", "short", "gone", "state"])
def test_work_with_other_settings_or_files_is_begun_anew(
    data, tmp_path, monkeypatch, change
):
    out, lines = tmp_path / "out", []
    with monkeypatch.context() as patch:
        interrupt(patch, prepare.Manifest, "save", 0)
        interrupt(patch, prepare, "_close", 1 if change != "settings" else 99)
        with pytest.raises(OSError, match="full"):
            call(data, out, shard_tokens=1000)
    options = {"shard_tokens": 1000}
    if change == "settings":
        options = {"shard_tokens": 1001}
    elif change == "sources":
        (data / "b00.txt").write_text("other")
    elif change == "short":
        os.truncate(out / "unfinished" / "train_000.bin", 5)
    elif change == "gone":
        (out / "unfinished" / "train_000.ends").unlink()
    else:
        (out / "unfinished" / "state.json").write_text("{")
    call(data, out, log=lines.append, **options)
    assert any("anew" in line for line in lines)
    call(data, tmp_path / "whole", **options)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "names", ["train.bin", "tokenizer.json unfinished/a.txt", "config.json lock"]
)
def test_a_folder_with_other_files_is_left_as_it_is(data, tmp_path, names):
    for name in names.split():
        (path := tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"out .*{names.split()[0]}"):
        call(data, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_file_in_place_of_the_folder_is_named(data):
    with pytest.raises(FileExistsError, match=r"a\.jsonl"):
        call(data, data / "a.jsonl")


@pytest.mark.parametrize("name", ["val_000.bin", "train_000.ends", "tokenizer.json"])
def test_a_finished_folder_with_a_damaged_file_is_prepared_anew(data, tmp_path, name):
    call(data, out := tmp_path / "out")
    before, lines = bytes_of(out), []
    for damage in ((out / name).unlink, lambda: os.truncate(out / name, 8)):
        damage()
        call(data, out, log=lines.append)
        assert name in lines[0]
        assert bytes_of(out) == before
        lines.clear()


def test_a_file_that_changes_while_it_is_read_makes_no_corpus(
    data, tmp_path, monkeypatch
):
    tokenize = prepare._tokenize

    def append_then_tokenize(*arguments):
        with (data / "a.jsonl").open("a") as file:
            file.write('{"text": "tale 1"}\n')
        tokenize(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_tokenize", append_then_tokenize)
        with pytest.raises(ValueError, match="changed"):
            call(data, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert call(data, tmp_path / "out").documents == len(TEXTS) + 1


@pytest.mark.skipif(not fcntl, reason="Windows has no flock")
def test_a_second_process_waits_for_the_first(data, tmp_path):
    (out := tmp_path / "out").mkdir()
    lock, lines = (out / "lock").open("w"), []
    fcntl.flock(lock, fcntl.LOCK_EX)

    def log(line):
        if not lines:
            lock.close()  # the first ends
        lines.append(line)

    call(data, out, log=log)
    assert str(out) in lines[0]
    assert (out / "manifest.json").exists()


def test_a_character_vocabulary_has_all_characters_and_an_end_token(data, tmp_path):
    lines = []
    write(data / "z.jsonl", [f"a {END_OF_TEXT} and {END_OF_TEXT}"])
    call(data, tmp_path / "out", log=lines.append)
    tokenizer = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert tokenizer.characters == "".join(sorted({*"".join(TEXTS), *END_OF_TEXT, "d"}))
    assert tokenizer.end_of_text == len(tokenizer.characters)
    assert any(END_OF_TEXT in line and "2" in line for line in lines)


def test_bpe_learns_from_a_sample_of_the_training_part_in_any_order(
    tmp_path, monkeypatch
):
    words = [f"{n * 7919:x}" for n in range(60)]
    texts = [" ".join(words[n:] + words[:n]) for n in range(60)]
    train = [text for text in texts if not is_val(text)]
    for limit in (1 << 20, 1000):
        monkeypatch.setattr(prepare, "_SAMPLE", limit)
        vocabularies = []
        for n, order in enumerate((texts, texts[::-1], texts * 2)):
            path = write(tmp_path / f"{limit}-{n}.jsonl", order)
            out = tmp_path / f"out-{limit}-{n}"
            call(path, out, "bpe", vocab_size=300, dedup=True)
            vocabularies.append((out / "tokenizer.json").read_text())
        assert len(set(vocabularies)) == 1
        lowest = sorted(train, key=lambda t: hashlib.sha256(t.encode()).digest()[8:16])
        sample, size = [], 0
        for text in lowest:
            sample.append(text[: max(limit - size, 0)])
            size += len(text)
        expected = BPETokenizer.train(filter(None, sample), 300, documents=True)
        assert vocabularies[0] == expected.to_json()


def test_a_tokenizer_of_the_users_own_needs_an_end_token(data, tmp_path):
    path = tmp_path / "tokenizer.json"
    CharTokenizer("tale").save(path)
    with pytest.raises(ValueError, match=rf"{path} .*special"):
        call(data, tmp_path / "out", str(path))
    CharTokenizer("tale", [END_OF_TEXT]).save(path)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: no tokens .*character"):
        call(data, tmp_path / "out", str(path))
    path = tmp_path / "gpt2" / "tokenizer.json"  # a folder, not the name
    path.parent.mkdir()
    CharTokenizer("".join(sorted(set("".join(TEXTS)))), [END_OF_TEXT]).save(path)
    call(data, tmp_path / "out", str(path.parent))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()
    train, val = read(tmp_path / "out").values()
    assert {*train, *val} == set(TEXTS)


def test_an_empty_split_is_told_and_no_document_at_all_is_an_error(
    tmp_path,
):
    lines = []
    path = write(tmp_path / "a.jsonl", ["to be"])
    call(path, tmp_path / "out", log=lines.append, val_fraction=0)
    assert any("--val-fraction" in line for line in lines)
    assert read(tmp_path / "out") == {"train": ["to be"], "val": []}
    call(path, tmp_path / "none", log=lines.append, val_fraction=1 - 1e-9)
    assert "train" in lines[-2]
    assert read(tmp_path / "none") == {"train": [], "val": ["to be"]}
    (tmp_path / "empty.jsonl").touch()
    for tokenizer in ("char", "gpt2"):
        with pytest.raises(ValueError, match="no document"):
            call(tmp_path / "empty.jsonl", tmp_path / "empty", tokenizer)


@pytest.fixture(scope="module", params=["gpt2", "bpe"])
def implementations(request):
    """A tokenizer's `encode`, and the faster implementation of it."""
    tokenizer = gpt2_tokenizer()
    if request.param == "bpe":
        text = (ROOT / "README.md").read_text() + "don't é🙂 aaaaaaa\n\n\n " * 20
        tokenizer = BPETokenizer.train([text], 1000)
    assert passes.suits_tiktoken(tokenizer)
    return tokenizer.encode, passes.tiktoken_encode(tokenizer)


WORDS = st.sampled_from(["'ll", " ", "\n\n ", "don't", "é", "🙂", "12", "<|", "a" * 99])
TEXT = st.text() | st.lists(WORDS, max_size=9).map("".join)


@given(text=TEXT, size=st.integers(1, 9))
def test_the_faster_implementation_gives_the_same_ids(implementations, text, size):
    encode, faster = implementations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgpt.text.tokenizer._SEGMENT", size)
        patch.setattr("jaxgpt.text.tokenizer._LONGEST_SEGMENT", 20 * size)
        assert faster(text).tolist() == encode(text).tolist()


def test_the_faster_implementation_cuts_words_of_more_than_a_million_characters(
    implementations,
):
    _, faster = implementations
    words = "".join(random.Random(0).choices("acgt", k=1 << 20)), " " * (1 << 20)
    for word in words:
        parts = faster(word).tolist() + faster("gattaca").tolist()
        assert faster(word + "gattaca").tolist() == parts


def bpe(*merges):
    """A tokenizer of bytes, merges such as "a b" in order, and an end token."""
    tokens = [*sorted(ByteLevel.alphabet())]
    tokens += dict.fromkeys(merge.replace(" ", "") for merge in merges)
    vocab = {token: id_ for id_, token in enumerate([*tokens, END_OF_TEXT])}
    model = BPE(vocab, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    return BPETokenizer(tokenizer)


@given(data=st.data())
def test_a_tokenizer_that_suits_tiktoken_has_the_same_ids_there(data):
    tokens, merges = ["a", "b"], []
    for _ in range(data.draw(st.integers(1, 6))):
        pair = [data.draw(st.sampled_from(tokens)) for _ in "12"]
        tokens.append("".join(pair))
        merges.append(" ".join(pair))
    tokenizer = bpe(*merges)
    assume(passes.suits_tiktoken(tokenizer))
    faster = passes.tiktoken_encode(tokenizer)
    for _ in range(9):
        text = data.draw(st.text("ab"))
        assert faster(text).tolist() == tokenizer.encode(text).tolist()


def test_only_a_tokenizer_of_proper_merges_in_the_order_of_ids_suits_tiktoken():
    assert passes.suits_tiktoken(bpe("a b", "ab c"))
    assert not passes.suits_tiktoken(bpe("a b", "b c", "a bc"))  # "abc" is ab, c
    assert not passes.suits_tiktoken(bpe("a bc", "b c"))  # of a later token
    values = json.loads(bpe("a b", "c d").to_json())
    values["model"]["merges"].reverse()
    assert not passes.suits_tiktoken(
        BPETokenizer.from_json(json.dumps(values).encode())
    )
    more = tokenizers.Tokenizer.from_str(bpe("a b").to_json())
    more.add_tokens(["more"])
    assert not passes.suits_tiktoken(BPETokenizer(more))
    assert not passes.suits_tiktoken(CharTokenizer("ab", [END_OF_TEXT]))


@pytest.mark.processes
@pytest.mark.slow
def test_killed_at_five_random_times_the_bytes_are_the_same(tmp_path):
    rng, path = random.Random(5), tmp_path / "a.jsonl"
    write(path, [" ".join(rng.choices(TEXTS, k=40)) for _ in range(5_000)])
    script = (
        "import runpy; from jaxgpt.text import prepare; prepare._SAVE_SECONDS = 0; "
        "runpy.run_module('jaxgpt', run_name='__main__')"
    )
    command = ("-c", script, "prepare", path, "--tokenizer", "gpt2", "--out-dir")
    finish(start_script(*command, tmp_path / "whole"))
    out = tmp_path / "out"
    total = _size(tmp_path / "whole")
    for share in sorted(rng.uniform(0, 0.9) for _ in range(5)):
        process = start_script(*command, out)
        while process.poll() is None and _size(out) < share * total:
            time.sleep(0.001)
        process.kill()
        process.communicate()  # to the end of stderr, which its workers have too
        assert process.returncode == -9
    _, err = finish(start_script(*command, out))
    assert "going on after" in err
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def _size(folder):
    sizes = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it has been moved
            sizes += path.stat().st_size if path.suffix in (".bin", ".ends") else 0
    return sizes
