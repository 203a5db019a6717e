import os
import pickle
import shutil

import numpy as np
import pytest
from conftest import TEXT, TINY, changed

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.text import corpus as corpus_module
from jaxgpt.text import tokenizer as tokenizer_module
from jaxgpt.text.corpus import load_corpus

UNKNOWN = changed(TINY, model={"vocab_size": None})


def load(*paths, vocab_size=None, tokenizer="char", resumed_tokenizer=None):
    """The corpus of these files, and the config that it settles."""
    config = changed(
        UNKNOWN,
        data={"path": tuple(map(str, paths)), "tokenizer": tokenizer},
        model={"vocab_size": vocab_size},
    )
    return load_corpus(config, lambda line: None, resumed_tokenizer)


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

    def test_text_is_read_in_chunks_as_it_stands(self, tmp_path, monkeypatch):
        text = "\ufeffé€🙂a\r\n" * 50 + "\r"
        (tmp_path / "text").write_bytes(text.encode())
        monkeypatch.setattr(corpus_module, "_CHUNK", 5)
        corpus, _ = load(tmp_path / "text")
        tokens = np.concatenate([corpus.train, corpus.val])
        assert corpus.tokenizer.decode(tokens) == text

    def test_tokens_are_memory_mapped_in_nanogpts_type(self, text_file):
        corpus, _ = load(text_file)
        assert isinstance(corpus.train, np.memmap)
        assert corpus.train.dtype == np.uint16
        assert corpus_module.token_dtype(65_537) == np.uint32

    def test_half_written_tokens_are_never_used(self, text_file, monkeypatch):
        def die(tokenizer, chunks):
            yield tokenizer.encode("".join(chunks))[:100]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(corpus_module.CharTokenizer, "encode_chunks", die)
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
            (folder / "sizes.json").unlink,
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
        with pytest.raises(ValueError, match=r"leave .* out to take the tokenizer's"):
            load(text_file, vocab_size=500)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "text: the corpus is empty"),
            (b"ab" * 9 + b"\xff", "text is not UTF-8 text: invalid start byte"),
            (b"ab" * 9 + "€".encode()[:2], "text is not UTF-8 text: unexpected end"),
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


@pytest.mark.usefixtures("fresh_cache")
class TestBPE:
    def test_it_is_trained_on_the_train_split_alone(self, text_file):
        text_file.write_text(TEXT + "zzzzzz " * (len(TEXT) // 72))
        corpus, config = load(text_file, tokenizer="bpe", vocab_size=300)
        assert config.model.vocab_size == corpus.tokenizer.vocab_size == 300
        train, val = map(corpus.tokenizer.decode, (corpus.train, corpus.val))
        assert train + val == text_file.read_text()
        assert len(train) == int(0.9 * len(train + val))
        expected = BPETokenizer.train([train], 300)
        assert corpus.tokenizer.to_json() == expected.to_json()
        assert corpus.train.tolist() == expected.encode(train).tolist()
        assert corpus.val.tolist() == expected.encode(val).tolist()

    def test_chunks_and_pieces_leave_no_trace(self, text_file, monkeypatch):
        whole, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        shutil.rmtree(os.environ["JAXGPT_CACHE"])
        monkeypatch.setattr(corpus_module, "_CHUNK", 50)
        monkeypatch.setattr(tokenizer_module, "_PIECE", 7)
        cut, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        assert cut.tokenizer.to_json() == whole.tokenizer.to_json()
        assert cut.train.tolist() == whole.train.tolist()

    def test_it_is_trained_once_and_its_tokens_are_kept(self, text_file, monkeypatch):
        first, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        monkeypatch.delattr(BPETokenizer, "train")
        monkeypatch.delattr(BPETokenizer, "encode_chunks")
        again, _ = load(text_file, tokenizer="bpe", vocab_size=300)
        assert again.train.tolist() == first.train.tolist()

    def test_each_tokenizer_has_tokens_of_its_own(self, text_file):
        for flags in ({}, *({"tokenizer": "bpe", "vocab_size": n} for n in (300, 280))):
            corpus, _ = load(text_file, **flags)
            train = TEXT[: int(0.9 * len(TEXT))]
            assert corpus.train.tolist() == corpus.tokenizer.encode(train).tolist()

    def test_a_file_of_the_name_of_a_tokenizer_is_not_taken_for_it(
        self, text_file, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        for name in ("char", "bpe", "gpt2"):
            (tmp_path / name).mkdir()
        assert load(text_file)[1].data.tokenizer == "char"
        _, config = load(text_file, tokenizer="bpe", vocab_size=300)
        assert config.data.tokenizer == "bpe"

    def test_a_runs_own_tokenizer_rules(self, text_file):
        own = BPETokenizer.train(["tells a tale " * 9], 262)
        corpus, _ = load(text_file, vocab_size=262, resumed_tokenizer=own)
        assert (
            corpus.train.tolist() == own.encode(TEXT[: int(0.9 * len(TEXT))]).tolist()
        )

    def test_a_saved_one_is_taken_by_its_path(self, text_file, tmp_path, monkeypatch):
        own = BPETokenizer.train([TEXT], 290)
        own.save(tmp_path / "own.json")
        monkeypatch.chdir(tmp_path)
        corpus, config = load(text_file, tokenizer="own.json")
        assert config.model.vocab_size == 290
        assert config.data.tokenizer == str(tmp_path / "own.json")
        assert corpus.tokenizer.to_json() == own.to_json()
        padded, config = load(text_file, vocab_size=320, tokenizer="own.json")
        assert config.model.vocab_size == 320
        assert padded.train.tolist() == corpus.train.tolist()
        with pytest.raises(
            ValueError, match="vocab_size=280, but the tokenizer has 290"
        ):
            load(text_file, vocab_size=280, tokenizer="own.json")


def test_tiny_shakespeare_has_as_many_gpt2_tokens_as_nanogpt_says():
    config = changed(UNKNOWN, data={"tokenizer": "gpt2"})
    corpus, config = load_corpus(config, log=lambda line: None)
    assert (len(corpus.train), len(corpus.val)) == (301_966, 36_059)
    assert config.model.vocab_size == 50_257


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

    def test_their_tokenizer_may_be_named(self, folder):
        corpus, config = load(folder, tokenizer="gpt2")
        assert corpus.tokenizer.vocab_size == config.model.vocab_size == 50257
        with pytest.raises(FileNotFoundError, match="no tokenizer 'bpe'"):
            load(folder, tokenizer="bpe", vocab_size=300)
        corpus.tokenizer.save(folder / "tokenizer.json")
        assert load(folder)[0].tokenizer.to_json() == corpus.tokenizer.to_json()

    def test_tokens_of_another_tokenizer_than_the_models_are_refused(self, folder):
        itos = {i: chr(200 + i) for i in range(100)}
        (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": itos}))
        own = CharTokenizer("".join(itos.values()))
        assert load(folder, resumed_tokenizer=own)[0].tokenizer is own
        other = CharTokenizer("".join(itos.values())[::-1])
        with pytest.raises(
            ValueError, match="are of the tokenizer beside them, and not"
        ):
            load(folder, resumed_tokenizer=other)

    def test_gpt2s_tokenizer_out_of_reach_stops_no_training(self, folder, monkeypatch):
        def offline(log):
            raise OSError("no network")

        monkeypatch.setattr(corpus_module.pretrained, "gpt2_tokenizer", offline)
        corpus, _ = load(folder, tokenizer="gpt2", vocab_size=50257)
        assert corpus.tokenizer is None
        with pytest.raises(ValueError, match="says nothing of its vocabulary"):
            load(folder, tokenizer="gpt2")

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
