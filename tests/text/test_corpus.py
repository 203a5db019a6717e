import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import TEXT, TINY, changed

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.text import corpus, pretrained, textfiles
from jaxgpt.text import tokenizer as tokenizer_module
from jaxgpt.text.corpus import known_vocab_size, load_corpus, load_split
from jaxgpt.text.tokenizer import END_OF_TEXT, load_tokenizer

pytestmark = pytest.mark.usefixtures("fresh_cache")
UNKNOWN = changed(TINY, model={"vocab_size": None})
TRAIN, VAL = TEXT[: int(0.9 * len(TEXT))], TEXT[int(0.9 * len(TEXT)) :]


def load(*paths, tokenizer="char", resumed_tokenizer=None, **model):
    """The corpus of these files, and the config with what it fills in."""
    data = {"path": tuple(map(str, paths)), "tokenizer": tokenizer}
    config = changed(UNKNOWN, data=data, model=model)
    return load_corpus(config, lambda line: None, resumed_tokenizer)


def split_of(split, *paths, tokenizer=None, vocab_size=None, log=lambda line: None):
    """A split of these files, for a model that has the tokenizer or this vocabulary."""
    size = tokenizer.vocab_size if tokenizer else vocab_size
    data = {"path": tuple(map(str, paths))}
    config = changed(UNKNOWN, data=data, model={"vocab_size": size})
    return load_split(config, split, log, tokenizer)[:]


def text_of(corpus):
    return corpus.tokenizer.decode(np.concatenate([corpus.train[:], corpus.val[:]]))


class TestText:
    def test_split_is_90_10_by_position_in_memory_mapped_uint16(self, text_file):
        corpus, config = load(text_file)
        assert corpus.tokenizer.decode(corpus.train[:]) == TRAIN
        assert corpus.tokenizer.decode(corpus.val[:]) == VAL
        assert config.model.vocab_size == len(set(TEXT))
        assert isinstance(corpus.train[:], np.memmap)
        assert corpus.train.dtype == np.uint16  # as nanoGPT's

    def test_files_are_joined_in_order_without_byte_order_marks(
        self, tmp_path, monkeypatch
    ):
        texts = ["é€🙂\0a\ufeff\r\n" * 50 + "\r", "ab" * 60]
        for name, text in zip("ab", texts, strict=True):
            (tmp_path / name).write_bytes(("\ufeff" + text).encode())
        monkeypatch.setattr(textfiles, "_CHUNK", 5)
        corpus, config = load(tmp_path / "a", tmp_path / "b")
        assert text_of(corpus) == "".join(texts)
        content = (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes()
        assert config.data.sha256 == hashlib.sha256(content).hexdigest()

    def test_a_folder_stands_for_its_text_files_in_sorted_order(self, tmp_path):
        texts = {"b.txt": "b" * 20, "a/z.txt": "z" * 20}
        texts |= dict.fromkeys(("c.md", ".d/d.txt", "._b.txt"), "left out")
        for name, text in texts.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        corpus, config = load(tmp_path, tmp_path / "b.txt", block_size=2)
        assert text_of(corpus) == "z" * 20 + "b" * 40
        assert config.data.path == (str(tmp_path), str(tmp_path / "b.txt"))

    def test_what_cannot_be_read_twice_is_refused_and_never_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.txt")
        for path in (tmp_path, tmp_path / "pipe.txt", "-"):
            with pytest.raises((ValueError, FileNotFoundError), match=r"pipe\.txt |- "):
                load(path)

    def test_progress_counts_bytes_read_and_characters_tokenized(
        self, text_file, monkeypatch
    ):
        done = {}

        @contextmanager
        def progress(label, total):
            yield lambda amount: counts.append(amount)
            done[label] = (total, sum(counts))

        counts = []
        text_file.write_text("€" + TEXT)
        size = text_file.stat().st_size
        monkeypatch.setattr(textfiles, "_CHUNK", 1000)
        monkeypatch.setattr(textfiles, "progress", progress)
        load(text_file)
        total = len(TEXT) + 1
        assert done == {
            "reading the text": (size, size),
            "tokenizing": (total, size + total),
        }

    def test_incomplete_cached_tokens_are_written_again(
        self, text_file, fresh_cache, monkeypatch
    ):
        def interrupted(tokenizer, chunks):
            yield tokenizer.encode("".join(chunks))[:100]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(CharTokenizer, "encode_chunks", interrupted)
            with pytest.raises(KeyboardInterrupt):
                load(text_file)
        assert text_of(load(text_file)[0]) == TEXT
        (folder,) = (fresh_cache / "tokens").iterdir()
        for damage in (
            lambda: os.truncate(folder / "train.bin", 100),
            (folder / "val.bin").unlink,
            (folder / "sizes.json").unlink,
        ):
            damage()
            assert text_of(load(text_file)[0]) == TEXT

    def test_a_text_is_scanned_again_only_if_a_file_changes(
        self, text_file, monkeypatch
    ):
        def scan(paths):
            scans.append(paths)
            return real_scan(paths)

        scans, real_scan = [], textfiles._scan
        monkeypatch.setattr(textfiles, "_scan", scan)
        os.utime(text_file, (1, 1))
        for _ in range(2):
            assert text_of(load(text_file)[0]) == TEXT
        assert len(scans) == 1
        text_file.write_text("T" + TEXT[1:-1] + "!")  # of the same size
        os.utime(text_file, (2, 2))
        assert text_of(load(text_file)[0]) == text_file.read_text()
        assert len(scans) == 2


class TestBPE:
    def test_it_is_trained_once_on_the_train_split_alone(self, text_file, monkeypatch):
        text_file.write_text(TEXT + "zzzzzz " * (len(TEXT) // 72))
        corpus, config = load(text_file, tokenizer="bpe", vocab_size=300)
        assert config.model.vocab_size == corpus.tokenizer.vocab_size == 300
        train, val = map(corpus.tokenizer.decode, (corpus.train[:], corpus.val[:]))
        assert train + val == text_file.read_text()
        assert len(train) == int(0.9 * len(train + val))
        expected = BPETokenizer.train([train], 300)
        assert corpus.tokenizer.to_json() == expected.to_json()
        assert corpus.train[:].tolist() == expected.encode(train).tolist()
        assert corpus.val[:].tolist() == expected.encode(val).tolist()
        monkeypatch.delattr(BPETokenizer, "train")
        monkeypatch.delattr(BPETokenizer, "encode_chunks")
        again, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        assert again.train[:].tolist() == corpus.train[:].tolist()

    def test_chunks_and_segments_do_not_change_it(self, text_file, monkeypatch):
        whole, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        shutil.rmtree(os.environ["JAXGPT_CACHE"])
        monkeypatch.setattr(textfiles, "_CHUNK", 50)
        monkeypatch.setattr(tokenizer_module, "_SEGMENT", 7)
        cut, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        assert cut.tokenizer.to_json() == whole.tokenizer.to_json()
        assert cut.train[:].tolist() == whole.train[:].tolist()

    def test_each_tokenizer_has_its_own_cached_tokens(self, text_file):
        for flags in ({}, *({"tokenizer": "bpe", "vocab_size": n} for n in (300, 280))):
            corpus, _ = load(text_file, **flags)
            assert corpus.train[:].tolist() == corpus.tokenizer.encode(TRAIN).tolist()

    def test_its_name_is_never_a_path(self, text_file, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("char", "bpe", "gpt2"):
            (tmp_path / name).mkdir()
        for flags in ({"tokenizer": "char"}, {"tokenizer": "bpe", "vocab_size": 300}):
            assert load(text_file, **flags)[1].data.tokenizer == flags["tokenizer"]

    def test_the_tokenizer_of_a_resumed_run_takes_precedence(self, text_file):
        own = BPETokenizer.train(["tells a tale " * 9], 262)
        corpus, _ = load(text_file, vocab_size=262, resumed_tokenizer=own)
        assert corpus.train[:].tolist() == own.encode(TRAIN).tolist()

    def test_a_saved_one_is_loaded_by_path(self, text_file, tmp_path, monkeypatch):
        own = BPETokenizer.train([TEXT], 290)
        own.save(tmp_path / "own.json")
        monkeypatch.chdir(tmp_path)
        corpus, config = load(text_file, tokenizer="own.json")
        assert config.model.vocab_size == 290
        assert config.data.tokenizer == str(tmp_path / "own.json")
        assert corpus.tokenizer.to_json() == own.to_json()
        padded, config = load(text_file, vocab_size=320, tokenizer="own.json")
        assert config.model.vocab_size == 320
        assert padded.train[:].tolist() == corpus.train[:].tolist()
        with pytest.raises(ValueError, match=r"vocab_size=280\b.* 290 "):
            load(text_file, vocab_size=280, tokenizer="own.json")


class TestDocuments:
    """Several files, by a tokenizer that has a token for the end of a document."""

    @pytest.fixture
    def files(self, tmp_path):
        """Paths of three documents, one of them empty."""
        texts = [f"{TEXT} {END_OF_TEXT}", "", " Once more. " + TEXT]
        for n, text in enumerate(texts):
            (tmp_path / f"{n}.txt").write_text(text)
        return sorted(tmp_path.glob("*.txt"))

    @pytest.fixture
    def bpe(self):
        return BPETokenizer.train([TEXT], 290)

    def test_each_is_tokenized_alone_and_ends_with_the_token(self, files, bpe):
        first, _, last = (bpe.encode(path.read_text()) for path in files)
        whole = split_of("all", *files, tokenizer=bpe)
        end = bpe.end_of_text
        assert whole.tolist() == [*first, end, *last, end]
        corpus, _ = load(*files, vocab_size=290, resumed_tokenizer=bpe)
        assert corpus.train[: len(first) + 1].tolist() == [*first, end]
        assert corpus.val[-1] == end
        assert (
            np.count_nonzero(np.concatenate([corpus.train[:], corpus.val[:]]) == end)
            == 2
        )

    def test_a_prompt_with_the_token_between_them_is_the_same_ids(self, files, bpe):
        paths = files[1:] + files[2:]  # the others spell the token
        text = files[2].read_text()
        ids = bpe.encode_prompt(f"{text}{END_OF_TEXT}{text}{END_OF_TEXT}")
        assert split_of("all", *paths, tokenizer=bpe).tolist() == ids.tolist()

    def test_one_file_alone_has_no_end_and_characters_have_none(self, files, bpe):
        first = files[0].read_text()
        alone = split_of("all", *files[:2], tokenizer=bpe)
        assert alone.tolist() == bpe.encode(first).tolist()
        corpus, _ = load(*files)
        assert text_of(corpus) == "".join(path.read_text() for path in files)

    def test_boundaries_elsewhere_are_tokenized_again(self, files, bpe):
        before = split_of("all", *files, tokenizer=bpe)
        text = files[0].read_text()
        files[0].write_text(text[:50])
        files[1].write_text(text[50:])
        after = split_of("all", *files, tokenizer=bpe)
        counts = [np.count_nonzero(ids == bpe.end_of_text) for ids in (before, after)]
        assert counts == [2, 3]

    def test_a_corpus_that_spells_the_token_is_told(self, files, bpe, monkeypatch):
        monkeypatch.setattr(textfiles, "_CHUNK", 7)  # some are cut
        files[0].write_text(f"tale{END_OF_TEXT}" * 30 + "<|endof")
        files[1].write_text("text|>")  # in another file
        for tokenizer, count in (
            (bpe, 2),
            (CharTokenizer.from_text(TEXT + END_OF_TEXT + "O"), 0),
        ):
            lines = []
            for _ in range(2):  # the second time, the tokens are cached
                split_of("all", *files, tokenizer=tokenizer, log=lines.append)
            told = [line for line in lines if END_OF_TEXT in line]
            assert len(told) == count
            assert all(" 30)" in line for line in told)


class TestSplitsToEvaluate:
    def test_all_of_a_text_is_tokenized_as_a_whole(self, tmp_path):
        own = BPETokenizer.train(["ab " * 9], 258)
        path = tmp_path / "text.txt"
        path.write_text("12345678ab")  # val is one character, and half of a token
        for split, text in (("all", "12345678ab"), ("train", "12345678a")):
            ids = split_of(split, path, tokenizer=own)
            assert ids.tolist() == own.encode(text).tolist()
        with pytest.raises(ValueError, match=r"2 tokens, but val .* has 1"):
            split_of("val", path, tokenizer=own)

    def test_all_token_files_are_train_and_then_val(self, tmp_path):
        np.arange(5, dtype=np.uint16).tofile(tmp_path / "train.bin")
        np.arange(3, dtype=np.uint16).tofile(tmp_path / "val.bin")
        ids = split_of("all", tmp_path, vocab_size=9)
        assert ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


class TestTokenFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        """A data directory as nanoGPT prepares it."""
        np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
        np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
        return tmp_path

    def test_nanogpts_files_are_used_with_their_own_tokenizer(self, folder):
        characters = "".join(chr(200 + i) for i in range(100))
        pretrained.save_nanogpt_meta(folder / "meta.pkl", CharTokenizer(characters))
        corpus, config = load(folder)
        assert config.model.vocab_size == 100
        assert corpus.train[:].tolist() == list(range(100))
        assert corpus.tokenizer.characters == characters
        own = CharTokenizer(characters)
        assert load(folder, resumed_tokenizer=own)[0].tokenizer is own
        with pytest.raises(ValueError, match=f"tokens in {folder}"):
            load(folder, resumed_tokenizer=CharTokenizer(characters[::-1]))

    def test_their_tokenizer_can_be_named_or_stored_beside_them(
        self, folder, monkeypatch
    ):
        own = BPETokenizer.train([TEXT], 300)
        monkeypatch.setattr(pretrained, "gpt2_tokenizer", lambda log: own)
        corpus, config = load(folder, tokenizer="gpt2")
        assert corpus.tokenizer is own
        assert config.model.vocab_size == 300
        with pytest.raises(FileNotFoundError, match="'bpe'"):
            load(folder, tokenizer="bpe", vocab_size=300)
        own.save(folder / "tokenizer.json")
        assert load(folder)[0].tokenizer.to_json() == own.to_json()

    def test_training_needs_the_size_of_the_vocabulary_but_no_tokenizer(
        self, folder, monkeypatch
    ):
        def offline(log):
            raise OSError("no network")

        assert load(folder, vocab_size=100)[0].tokenizer is None
        monkeypatch.setattr(pretrained, "gpt2_tokenizer", offline)
        assert load(folder, tokenizer="gpt2", vocab_size=50257)[0].tokenizer is None
        with pytest.raises(ValueError, match=r"--model\.vocab-size"):
            load(folder, tokenizer="gpt2")

    def test_a_large_vocabulary_is_read_as_32_bits(self, folder):
        for name in ("train.bin", "val.bin"):
            np.full(100, 70_000, np.uint32).tofile(folder / name)
        assert load(folder, vocab_size=70_001)[0].train[:].tolist() == [70_000] * 100
        dtypes = [textfiles.token_dtype(size) for size in (65_536, 65_537)]
        assert dtypes == [np.uint16, np.uint32]

    def test_splits_of_several_folders_follow_each_other(self, folder, tmp_path):
        other = shutil.copytree(folder, tmp_path / "other")
        np.arange(60, dtype=np.uint16).tofile(other / "train.bin")
        corpus, config = load(folder, other, vocab_size=100)
        assert corpus.train[:].tolist() == [*range(100), *range(60)]
        assert corpus.val[:].tolist() == [*range(50)] * 2
        alone = [load(path, vocab_size=100)[1].data.sha256 for path in (folder, other)]
        assert len({*alone, config.data.sha256}) == 3
        whole = split_of("all", folder, other, vocab_size=100)
        assert whole.tolist() == [*range(100), *range(60), *range(50), *range(50)]
        CharTokenizer("abc").save(folder / "tokenizer.json")
        CharTokenizer("abd").save(other / "tokenizer.json")
        with pytest.raises(ValueError, match=f"tokens in {other}"):
            load(folder, other)

    def test_each_weighed_folder_needs_a_window(self, folder, tmp_path):
        other = shutil.copytree(folder, tmp_path / "other")
        np.arange(9, dtype=np.uint16).tofile(other / "train.bin")
        data = {"path": (str(folder), str(other)), "weights": (1.0, 3.0)}
        config = changed(UNKNOWN, data=data, model={"vocab_size": 100})
        parts = load_corpus(config, lambda line: None)[0].parts
        assert [len(part) for part in parts] == [100, 9]
        config = changed(config, model={"block_size": 9})
        with pytest.raises(ValueError, match=f"{other} .* 9 tokens"):
            load_corpus(config, lambda line: None)

    def test_packing_needs_a_token_and_no_window(self, folder):
        data = {"path": (str(folder),), "packing": "documents"}
        sizes = {"vocab_size": 100, "block_size": 99}
        config = changed(UNKNOWN, data=data, model=sizes)
        np.array([7], np.uint16).tofile(folder / "val.bin")
        assert load_corpus(config, lambda line: None)[0].val[:].tolist() == [7]
        (folder / "val.bin").write_bytes(b"")
        with pytest.raises(ValueError, match=r"val split has 0 tokens"):
            load_corpus(config, lambda line: None)


class TestRecords:
    @pytest.fixture
    def records(self, tmp_path):
        """300 documents in a JSONL file."""
        path = tmp_path / "tales" / "tales.jsonl"
        path.parent.mkdir()
        texts = [f"{n} winters, a tale tells." for n in range(300)]
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        return path

    def test_they_are_prepared_into_the_cache_until_they_change(
        self, records, monkeypatch
    ):
        lines = []
        data = {"path": (str(records.parent),), "tokenizer": "bpe"}
        config = changed(UNKNOWN, data=data, model={"vocab_size": 270})
        first, found = load_corpus(config, lines.append)
        assert any("jaxgpt prepare" in line for line in lines)
        end = first.tokenizer.end_of_text
        counts = [np.count_nonzero(s[:] == end) for s in (first.train, first.val)]
        assert sum(counts) == 300
        assert 0 < counts[1] < 30
        assert first.tokenizer.decode(first.train[:100]).startswith("0 winters, a tale")
        monkeypatch.setattr(corpus, "prepare", None)
        again, same = load_corpus(config, lines.append)
        resumed, also_same = load_corpus(found, lines.append, first.tokenizer)
        assert same == also_same == found
        for each in (again, resumed):
            assert each.train[:].tolist() == first.train[:].tolist()
        os.utime(records, (1, 1))  # as if it had changed
        with pytest.raises(TypeError, match="NoneType"):  # calls `prepare`
            load_corpus(config, lines.append)

    def test_the_name_of_a_link_says_what_the_file_holds(self, records, tmp_path):
        records.rename(blob := tmp_path / "0123abcd")  # as in Hugging Face's cache
        records.symlink_to(blob)
        linked, config = load(records, tokenizer="bpe", vocab_size=270)
        assert config.data.path == (str(records),)
        assert linked.tokenizer.decode(linked.train[:9]).startswith("0 winters")

    def test_a_run_that_was_not_trained_on_them_keeps_its_tokenizer(
        self, records, monkeypatch
    ):
        def prepare(inputs, folder, *, log, tokenizer):
            raise LookupError(
                Path(tokenizer).name, load_tokenizer(Path(tokenizer)).to_json()
            )

        monkeypatch.setattr(corpus, "prepare", prepare)
        own = CharTokenizer("".join(sorted(set(records.read_text()))), [END_OF_TEXT])
        for flags in ({}, {"tokenizer": "bpe", "vocab_size": own.vocab_size}):
            with pytest.raises(LookupError) as imported:
                load(records, resumed_tokenizer=own, **flags)
            name, content = imported.value.args
            assert content == own.to_json()
        moved = str(records.parent / "old" / "cache" / name)  # as the config then says
        with pytest.raises(LookupError) as resumed:
            load(records, resumed_tokenizer=own, tokenizer=moved)
        assert resumed.value.args == imported.value.args
        with pytest.raises(ValueError, match=r"tales\.jsonl: .*endoftext"):
            load(records, resumed_tokenizer=CharTokenizer(own.characters))


def test_paths_of_different_kinds_are_refused(text_file, tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(99, dtype=np.uint16).tofile(tmp_path / name)
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder of tokens"):
        load(text_file, tmp_path, vocab_size=99)
    config = changed(UNKNOWN, data={"path": (str(text_file),), "weights": (1.0,)})
    with pytest.raises(ValueError, match=r"--data\.weights"):
        load_corpus(config, lambda line: None)
    (tmp_path / "part" / "unfinished").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"part .*prepare"):
        load(tmp_path / "part")


def test_only_a_vocabulary_that_needs_no_text_is_known():
    for data, size in (
        ({}, 65),
        ({"corpus": "reviews"}, None),
        ({"corpus": "reviews", "tokenizer": "gpt2"}, 50_257),
        ({"path": ("text.txt",)}, None),
    ):
        assert known_vocab_size(changed(TINY, data=data)) == size
