import numpy as np
import pytest
from conftest import EXAMPLE_KINDS, changed, examples_config

from jaxgpt.text import labelled, tasks, tatoeba
from jaxgpt.text.corpus import load_corpus, load_split
from jaxgpt.text.examples import row_keys
from jaxgpt.text.tables import split_of
from jaxgpt.text.tokenizer import END_OF_TEXT, MASK

pytestmark = pytest.mark.usefixtures("fresh_cache")


def silent(line):
    """Logs nothing."""


def load(config, tokenizer=None):
    return load_corpus(config, silent, tokenizer)


def texts_of(examples, tokenizer):
    """The first text of each example, without special tokens."""
    texts = examples.sources if hasattr(examples, "sources") else examples.texts
    return [
        tokenizer.decode([id_ for id_ in ids if id_ != tokenizer.end_of_text])
        for ids in texts
    ]


@pytest.mark.parametrize("architecture", EXAMPLE_KINDS)
def test_no_text_is_in_two_splits_and_all_have_every_text(tmp_path, architecture):
    corpus, config = load(examples_config(tmp_path, architecture))
    splits = {
        split: texts_of(
            load_split(config, split, silent, corpus.tokenizer), corpus.tokenizer
        )
        for split in ("train", "val", "test", "all")
    }
    whole = set(splits.pop("all"))
    assert set().union(*splits.values()) == whole
    assert sum(len(set(texts)) for texts in splits.values()) == len(whole) > 150
    assert splits["train"] == texts_of(corpus.train, corpus.tokenizer)
    assert splits["val"] == texts_of(corpus.val, corpus.tokenizer)
    assert len(config.data.sha256) == 64


@pytest.mark.parametrize("tokenizer", ["char", "bpe", "gpt2"])
def test_a_tokenizer_gets_the_special_tokens_of_the_task(tmp_path, tokenizer):
    config = examples_config(tmp_path, "masked-lm", tokenizer)
    if tokenizer == "gpt2":
        config = changed(config, model={"vocab_size": None})
    corpus, config = load(config)
    sizes = {"char": 8 + 2, "bpe": 270, "gpt2": 50_258}
    assert config.model.vocab_size == corpus.tokenizer.vocab_size == sizes[tokenizer]
    assert corpus.train.mask_token == corpus.tokenizer.special_id(MASK)
    assert corpus.train.mask_token == sizes[tokenizer] - 1
    end = corpus.tokenizer.special_id(END_OF_TEXT)
    assert {ids[0] for ids in corpus.train.texts} == {end}


def test_bpe_is_trained_on_the_training_part_only(tmp_path, monkeypatch):
    seen = []
    train = tasks.BPETokenizer.train

    def spy(texts, *rest):
        seen.extend(texts)
        return train(texts, *rest)

    monkeypatch.setattr(tasks.BPETokenizer, "train", spy)
    corpus, _ = load(examples_config(tmp_path, "classifier", "bpe"))
    assert seen == texts_of(corpus.train, corpus.tokenizer)


def test_labels_are_those_of_the_training_part_in_sorted_order(tmp_path):
    corpus, config = load(examples_config(tmp_path, "classifier"))
    assert config.model.labels == ("7", "8", "9")
    rows = (tmp_path / "labelled.csv").read_text().splitlines()[1:]
    labels = [config.model.labels[id_] for id_ in corpus.train.labels_N]
    texts = texts_of(corpus.train, corpus.tokenizer)
    assert {f"{t},{n}" for t, n in zip(texts, labels, strict=True)} <= set(rows)
    other = changed(config, model={"labels": ("9", "8", "7")})
    np.testing.assert_array_equal(
        load(other)[0].train.labels_N, 2 - corpus.train.labels_N
    )


def test_an_unknown_label_and_a_single_label_are_errors(tmp_path):
    config = examples_config(tmp_path, "classifier")
    corpus, trained = load(config)
    path = tmp_path / "other.csv"
    path.write_text("text,label\na,7\nb,good\n")
    data = {"path": (str(path),), "sha256": ""}
    with pytest.raises(ValueError, match="'good'"):
        load_split(changed(trained, data=data), "all", silent, corpus.tokenizer)
    path.write_text("text,label\n" + "".join(f"{n},7\n" for n in range(100)))
    with pytest.raises(ValueError, match=r"\['7'\]"):
        load(changed(config, data=data))


def test_labels_that_only_another_split_has_can_be_named(tmp_path):
    config = examples_config(tmp_path, "classifier")
    path = tmp_path / "labelled.csv"
    header, *rows = path.read_text().splitlines()
    _, trained = load(config)
    for split, where in (("test", 2), ("val", 1)):
        text = next(
            text
            for text in (row.split(",")[0] for row in rows)
            if split_of(text, labelled._FRACTION) == where
        )
        path.write_text("\n".join([header, *rows, f"{text},rare"]))
        if split == "val":
            with pytest.raises(ValueError, match=r"'rare'.*labels 7 8 9 rare"):
                load(config)
        else:
            assert load(config)[1].model == trained.model
        named = changed(config, model={"labels": ("7", "8", "9", "rare")})
        corpus, _ = load(named)
        found = load_split(named, split, silent, corpus.tokenizer)
        assert 3 in found.labels_N
    with pytest.raises(ValueError, match=r"'9'.*labels 7 8 9"):
        load(changed(config, model={"labels": ("7", "8")}))


def test_characters_that_the_training_part_lacks_are_left_out_of_other_text(tmp_path):
    corpus, config = load(examples_config(tmp_path, "classifier"))
    path, lines = tmp_path / "other.csv", []
    path.write_text("text,label\naé日b,7\n", encoding="utf-8")
    config = changed(config, data={"path": (str(path),), "sha256": ""})
    found = load_split(config, "all", lines.append, corpus.tokenizer)
    assert texts_of(found, corpus.tokenizer) == ["ab"]
    assert any("é日" in line for line in lines)


def test_a_split_without_examples_is_an_error_that_names_it(tmp_path):
    (tmp_path / "two.tsv").write_text("a\tb\nc\td\n")
    config = examples_config(tmp_path, "seq2seq")
    config = changed(config, data={"path": (str(tmp_path / "two.tsv"),)})
    with pytest.raises(ValueError, match=r"the (val|train) split"):
        load(config)


def test_a_changed_corpus_is_refused_and_a_run_keeps_its_tokenizer(tmp_path):
    corpus, config = load(examples_config(tmp_path, "seq2seq"))
    again, same = load(config, corpus.tokenizer)
    assert again.tokenizer is corpus.tokenizer
    assert same == config
    (tmp_path / "pairs.tsv").write_text("x\ty\n")
    with pytest.raises(ValueError, match="has changed"):
        load(config, corpus.tokenizer)


def test_other_languages_of_a_run_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "tatoeba.tsv"
    lines = (f"{text}\t{text}\t{text}\t{text}\n" for text in map(str, range(200)))
    path.write_text("".join(lines))
    monkeypatch.setattr(tatoeba, "find_sentences", lambda log: path)
    config = examples_config(tmp_path, "seq2seq")
    corpus, config = load(changed(config, data={"corpus": "tatoeba", "path": ()}))
    load(config, corpus.tokenizer)
    with pytest.raises(ValueError, match="has changed"):
        load(changed(config, data={"languages": "en-fr"}), corpus.tokenizer)


def test_another_format_is_not_taken_from_the_cache(tmp_path, fresh_cache, monkeypatch):
    config = examples_config(tmp_path, "classifier")
    load(config)
    monkeypatch.setattr(tasks, "_FORMAT", tasks._FORMAT + 1)
    load(config)
    for pattern in ("tokenizers/*", "examples/*"):
        assert len(list(fresh_cache.glob(pattern))) == 2


def batch_of(examples):
    """All examples as a batch."""
    rows = np.arange(len(examples))
    return examples.read(rows, 24, np.ones(len(rows)), row_keys(0, rows))


@pytest.mark.parametrize("architecture", EXAMPLE_KINDS)
def test_tokens_come_from_the_cache_unless_it_is_damaged(
    tmp_path, fresh_cache, architecture
):
    config, lines = examples_config(tmp_path, architecture), []
    first, full = load(config)
    (path,) = fresh_cache.glob("examples/*.npz")
    for tokenizer in fresh_cache.glob("tokenizers/*"):
        tokenizer.write_text("{")
    content = path.read_bytes()
    again, same = load_corpus(config, lines.append)
    assert (lines, same) == ([], full)
    flipped = content[:900] + bytes([content[900] ^ 1]) + content[901:]
    for damaged in (content[:-50], b"", flipped):
        path.write_bytes(damaged)
        mended, _ = load(config)
        assert path.read_bytes() == content
        for other in (again, mended):
            for one, two in zip(
                batch_of(first.train), batch_of(other.train), strict=True
            ):
                np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("architecture", EXAMPLE_KINDS)
def test_how_many_texts_are_cut_is_told_of_cached_tokens_too(tmp_path, architecture):
    config = changed(examples_config(tmp_path, architecture), model={"block_size": 9})
    first, again = [], []
    load_corpus(config, first.append)
    load_corpus(config, again.append)
    assert again
    assert first[-len(again) :] == again
    if architecture == "seq2seq":
        assert ["sources" in line for line in again] == [True, False]
        assert ["targets" in line for line in again] == [False, True]


def test_another_block_size_is_not_taken_from_the_cache(tmp_path):
    config = examples_config(tmp_path, "masked-lm")
    longest = int(load(config)[0].train.lengths.max())
    shorter = changed(config, model={"block_size": longest - 3})
    assert load(shorter)[0].train.lengths.max() == longest - 3


@pytest.mark.parametrize(
    ("architecture", "data", "message"),
    [
        ("classifier", {"corpus": "tinyshakespeare", "path": ()}, "corpus tinyshake"),
        ("gpt", {"corpus": "reverse", "path": ()}, "corpus reverse"),
        ("seq2seq", {"corpus": "reviews", "path": ()}, "corpus reviews"),
        ("seq2seq", {"languages": "en-fr"}, "languages en-fr"),
        ("classifier", {"weights": (1.0,)}, "weights"),
        ("classifier", {"path": ("FOLDER",)}, "folder of tokens"),
        ("classifier", {"path": ("text.txt",)}, r"text\.txt .*\.csv"),
        ("seq2seq", {"path": ("labelled.csv",)}, r"labelled\.csv .*\.tsv"),
    ],
)
def test_settings_for_another_task_are_refused(tmp_path, architecture, data, message):
    (tmp_path / "text.txt").write_text("text")
    folder = tmp_path / "FOLDER"
    folder.mkdir()
    (folder / "train.bin").touch()
    config = examples_config(tmp_path, "classifier")
    paths = data.get("path", config.data.path)
    data = data | {"path": tuple(str(tmp_path / path) for path in paths)}
    config = changed(config, model={"architecture": architecture}, data=data)
    with pytest.raises(ValueError, match=message):
        load(config)
