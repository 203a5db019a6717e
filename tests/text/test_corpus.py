import os
import pickle
import re

import numpy as np
import pytest
from conftest import TEXT, TINY, changed

from jaxgpt.text import corpus as corpus_module
from jaxgpt.text.corpus import load_corpus

UNKNOWN = changed(TINY, model={"vocab_size": None})


def load(*paths, **model):
    config = changed(UNKNOWN, data={"path": tuple(map(str, paths))}, model=model)
    return load_corpus(config, log=lambda line: None)


@pytest.mark.usefixtures("fresh_cache")
class TestText:
    def test_split_is_90_10_by_position(self, text_file):
        corpus, config = load(text_file)
        cut = int(0.9 * len(TEXT))
        assert corpus.tokenizer.decode(corpus.train) == TEXT[:cut]
        assert corpus.tokenizer.decode(corpus.val) == TEXT[cut:]
        assert config.model.vocab_size == len(set(TEXT))

    def test_files_are_read_one_after_the_other(self, tmp_path):
        (tmp_path / "a").write_text("ab" * 60)
        (tmp_path / "b").write_text("ba" * 60)
        corpus, _ = load(tmp_path / "a", tmp_path / "b")
        tokens = np.concatenate([corpus.train, corpus.val])
        assert corpus.tokenizer.decode(tokens) == "ab" * 60 + "ba" * 60

    def test_text_is_read_in_chunks_that_may_cut_a_character(
        self, tmp_path, monkeypatch
    ):
        text = "é€🙂a" * 50 + "\r\n"
        (tmp_path / "text").write_bytes(text.encode())
        monkeypatch.setattr(corpus_module, "_CHUNK_BYTES", 5)
        corpus, _ = load(tmp_path / "text")
        tokens = np.concatenate([corpus.train, corpus.val])
        assert corpus.tokenizer.decode(tokens) == text

    def test_tokens_are_memory_mapped_in_nanogpts_type(self, text_file):
        corpus, _ = load(text_file)
        assert isinstance(corpus.train, np.memmap)
        assert corpus.train.dtype == np.uint16
        assert corpus_module.token_dtype(65_537) == np.uint32

    def test_half_written_tokens_are_never_used(self, text_file, monkeypatch):
        def die(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(corpus_module.CharTokenizer, "save", die)
            with pytest.raises(KeyboardInterrupt):
                load(text_file)
        corpus, _ = load(text_file)
        assert len(corpus.train) + len(corpus.val) == len(TEXT)

    def test_cached_tokens_that_were_cut_or_lost_are_made_again(
        self, text_file, fresh_cache
    ):
        load(text_file)
        (folder,) = (fresh_cache / "tokens").iterdir()
        spoilers = [
            lambda: os.truncate(folder / "train.bin", 100),
            (folder / "val.bin").unlink,
            (folder / "tokenizer.json").unlink,
        ]
        for spoil in spoilers:
            spoil()
            corpus, _ = load(text_file)
            assert len(corpus.train) + len(corpus.val) == len(TEXT)

    def test_changed_text_is_refused_by_the_run_it_trained(self, text_file):
        _, config = load(text_file)
        text_file.write_text(TEXT + "!")
        with pytest.raises(ValueError, match="the corpus has changed"):
            load_corpus(config)

    def test_another_vocab_size_than_the_texts_is_an_error(self, text_file):
        with pytest.raises(ValueError, match=r"leave .* out to take the corpus"):
            load(text_file, vocab_size=500)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "no text, the corpus is empty"),
            (b"ab" * 9 + b"\xff", "byte 18 is 0xff"),
            (b"ab" * 9 + "€".encode()[:2], "byte 18 is 0xe2"),
            (b"ab" * 20, r"the val split has 4 tokens.*block_size \+ 1 = 9"),
        ],
    )
    def test_unusable_text_is_an_error_that_says_why(self, tmp_path, content, message):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "text")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt is not a file"):
            load(tmp_path / "nowhere.txt")


class TestTokenFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        """A prepared data directory of nanoGPT's."""
        np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
        np.arange(50, dtype=np.uint16).tofile(tmp_path / "val.bin")
        return tmp_path

    def test_nanogpts_files_are_used_as_they_are(self, folder):
        itos = {i: chr(200 + i) for i in range(100)}
        (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
        corpus, config = load(folder)
        assert config.model.vocab_size == 100
        assert corpus.train.tolist() == list(range(100))
        assert corpus.tokenizer.decode([3]) == chr(203)

    def test_files_without_a_vocabulary_need_its_size(self, folder):
        with pytest.raises(ValueError, match=r"--model\.vocab-size"):
            load(folder)
        corpus, _ = load(folder, vocab_size=100)
        assert corpus.tokenizer is None

    def test_a_large_vocabulary_is_read_as_32_bits(self, folder):
        for name in ("train.bin", "val.bin"):
            np.full(100, 70_000, np.uint32).tofile(folder / name)
        corpus, _ = load(folder, vocab_size=70_001)
        assert corpus.train.tolist() == [70_000] * 100

    def test_a_missing_file_is_named(self, folder):
        (folder / "val.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"val\.bin is not a file"):
            load(folder)

    def test_an_id_outside_the_vocabulary_is_named_with_its_file(self, folder):
        with pytest.raises(ValueError, match=r"train\.bin has token 99, outside .* 99"):
            load(folder, vocab_size=99)

    def test_a_file_cut_short_is_named(self, folder):
        (folder / "val.bin").write_bytes(b"\0" * 51)
        with pytest.raises(ValueError, match=r"val\.bin is cut short"):
            load(folder, vocab_size=100)


def test_a_cached_text_with_a_wrong_checksum_is_named(fresh_cache):
    fresh_cache.mkdir()
    path = fresh_cache / "tinyshakespeare.txt"
    path.write_text("Not Shakespeare")
    with pytest.raises(ValueError, match=re.escape(f"{path} is not Tiny Shakespeare")):
        load_corpus(UNKNOWN)
