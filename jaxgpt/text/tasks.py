"""Corpora of examples, for the tasks other than next-token prediction.

Their tokens are cached, so the files are read only if they, the tokenizer or block_size
have changed.
"""

import hashlib
import json
import shlex
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import (
    ClassifierConfig,
    Config,
    DataConfig,
    MaskedLMConfig,
    ModelConfig,
    Seq2SeqConfig,
)
from jaxgpt.files import replace_file
from jaxgpt.start import cache_dir
from jaxgpt.text import labelled, pairs, pretrained
from jaxgpt.text.examples import (
    Examples,
    LabelledTexts,
    MaskedTexts,
    Sequences,
    TextPairs,
)
from jaxgpt.text.tables import SPLITS, Log, Table
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    MASK,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
)

# The built-in corpora of each task, and of conversations.
CORPORA = {
    "next-token": ("tinyshakespeare", "reviews"),
    "classification": ("reviews",),
    "masked-tokens": ("reviews",),
    "translation": ("tatoeba", "reverse"),
    "conversations": ("chitchat",),
}
# To raise when the same files give other rows, splits, labels or tokens than before.
FORMAT = 1
Arrays = dict[str, Any]


def check_corpus(config: Config) -> None:
    """Raises ValueError if settings of the corpus are for another task or corpus."""
    data, task = config.data, config.model.task
    kind, of_kind = task, f"architecture={config.model.architecture}"
    if data.packing == "conversations":
        kind, of_kind = data.packing, f"packing={data.packing}"
    if not data.path and data.corpus not in CORPORA[kind]:
        raise ValueError(
            f"--data.corpus {data.corpus} does not fit {of_kind}; use --data.corpus "
            f"{' or '.join(CORPORA[kind])}, or your own --data.path"
        )
    if data.languages != DataConfig().languages and (
        data.path or data.corpus != "tatoeba"
    ):
        raise ValueError(
            f"--data.languages {data.languages} is for --data.corpus tatoeba, not for "
            f"{', '.join(data.path) or data.corpus}; omit it"
        )
    if config.model.block_size < 2 and task != "next-token":
        raise ValueError(
            f"block_size={config.model.block_size} has no room for a text beside the "
            "end-of-text token; raise --model.block-size"
        )
    if data.weights and task != "next-token":
        raise ValueError(
            "--data.weights are for folders of tokens, which architecture="
            f"{config.model.architecture} does not read; omit them"
        )


def open_table(task: str, data: DataConfig, log: Log) -> Table:
    """Finds the corpus of a task; raises OSError or ValueError if it can't be used."""
    if task == "translation":
        table = pairs.open_pairs(data, log)
    else:
        table = labelled.open_labelled(data, task == "classification", log)
    return replace(table, read=cache(table.read))


def special_tokens(task: str) -> tuple[str, ...]:
    """The special tokens that the texts of a task need."""
    return (END_OF_TEXT, MASK) if task == "masked-tokens" else (END_OF_TEXT,)


def training_texts(table: Table, task: str) -> Iterator[str]:
    """The texts of the training part's examples."""
    for row, split in zip(*table.read(), strict=True):
        if SPLITS[split] == "train":
            yield from row[: _texts(task)]


def make_tokenizer(
    read_texts: Callable[[], Iterable[str]],
    special: Sequence[str],
    config: Config,
    log: Log,
    key: str,
) -> Tokenizer:
    """Makes the tokenizer that `data.tokenizer` names, with special tokens.

    Args:
      read_texts: returns the training part's texts, to which the characters or the BPE
        are fitted.
      key: of these texts; the same ones are fitted once.
    """
    name = config.data.tokenizer
    if name not in ("char", "bpe"):
        return pretrained.find_tokenizer(name, log).with_special(special)
    size = config.model.vocab_size if name == "bpe" else 0
    path = cache_dir() / "tokenizers" / f"{key}-{name}-{size}.json"
    with suppress(OSError, ValueError):  # it is missing or damaged
        return load_tokenizer(path)
    texts = [*read_texts()]
    if not texts:
        raise ValueError(
            "the train split has no examples; give more, since each one's hash "
            "determines its split"
        )
    tokenizer: Tokenizer
    if name == "char":
        characters = "".join(sorted(set("".join(texts))))
        tokenizer = CharTokenizer(characters, special)
    else:
        log(f"training a BPE tokenizer of {size:,} tokens")
        tokenizer = BPETokenizer.train(texts, size or 0, True, special)
    replace_file(path, tokenizer.save)
    return tokenizer


def cached_arrays(key: str, make: Callable[[Log], Arrays], log: Log) -> Arrays:
    """Returns `make(log)`, or what it returned before; what it logged is logged again.

    Args:
      key: the digest of all that the arrays depend on.
    """
    path = cache_dir() / "examples" / f"{key}.npz"
    # Missing or damaged; NumPy raises these, and zipfile checks each array.
    damage = OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error
    with suppress(*damage), path.open("rb") as file:
        arrays = dict(np.load(file))
        for line in arrays["log"].tolist():
            log(line)
        return arrays
    log(f"tokenizing into {path}")
    lines = list[str]()
    arrays = make(lambda line: lines.append(f"all splits: {line}"))
    arrays["log"] = np.array(lines, str)
    for line in lines:
        log(line)

    def save(tmp_path: Path) -> None:
        with tmp_path.open("wb") as file:
            np.savez(file, **arrays)

    replace_file(path, save)
    return arrays


def tokenize(table: Table, config: Config, tokenizer: Tokenizer, log: Log) -> Arrays:
    """Tokenizes a table; returns what `make_examples` takes.

    These are token ids and offsets of each text, the ids of the labels and their names,
    the sources and the index of each example's split. Logs such as how many are cut.
    """
    rows, split_N = table.read()
    task, block_size = config.model.task, config.model.block_size
    texts = list(zip(*rows, strict=True))[: _texts(task)]
    sequences, others = [], Arrays()
    settings = tokenizer, block_size, log
    if task == "masked-tokens":
        pieces, of_text = labelled.encode_pieces(texts[0], *settings)
        sequences, split_N = [pieces], split_N[of_text]
    elif task == "classification":
        sequences = [labelled.encode_texts(texts[0], *settings)]
        _, labels, sources = zip(*rows, strict=True)
        names, ids = np.unique(labels, return_inverse=True)
        others = {"names": names, "labels": ids, "sources": np.array(sources)}
    else:
        sequences = [
            pairs.encode_sources(each, *settings, name)
            for each, name in zip(texts, ("sources", "targets"), strict=True)
        ]
    arrays = others | {"split": split_N}
    for n, each in enumerate(sequences):
        tokens = each.tokens.astype(token_dtype(tokenizer.vocab_size))
        arrays |= {f"tokens{n}": tokens, f"offsets{n}": each.offsets}
    return arrays


def labels_of(arrays: Arrays) -> tuple[str, ...]:
    """The labels of the training part, sorted; raises ValueError unless several."""
    in_train = arrays["labels"][arrays["split"] == SPLITS.index("train")]
    labels = tuple(arrays["names"][np.unique(in_train)].tolist())
    if len(labels) < 2:
        raise ValueError(
            f"the training part has the labels {list(labels)}, but to classify needs "
            "two or more; give more examples"
        )
    return labels


def make_examples(
    arrays: Arrays, model: ModelConfig, tokenizer: Tokenizer, split: str
) -> Examples:
    """Makes the examples of "train", "val", "test" or "all", from `tokenize`.

    Raises ValueError if there are none, or if the model does not know a label of them.
    """
    split_N = arrays["split"]
    keep_N = split_N == SPLITS.index(split) if split in SPLITS else split_N >= 0
    if not keep_N.any():
        raise ValueError(
            f"the {split} split has no examples; give more, since each one's hash "
            "determines its split"
        )
    texts = [
        Sequences(arrays[f"tokens{n}"], arrays[f"offsets{n}"]).select(keep_N)
        for n in range(_texts(model.task))
    ]
    end = tokenizer.end_of_text
    match model:
        case ClassifierConfig():
            names = arrays["names"][arrays["labels"][keep_N]].tolist()
            if unknown := sorted(set(names) - set(model.labels)):
                every = dict.fromkeys([*model.labels, *arrays["names"].tolist()])
                raise ValueError(
                    f"the label {unknown[0]!r} is not one of the model's "
                    f"{list(model.labels)}; remove its examples, or train with all "
                    f"labels: --model.labels {shlex.join(every)}"
                )
            labels_N = np.array([model.labels.index(name) for name in names], np.int32)
            return LabelledTexts(texts[0], labels_N, arrays["sources"][keep_N])
        case MaskedLMConfig():
            mask, size = tokenizer.special_id(MASK), tokenizer.vocab_size
            return MaskedTexts(texts[0], mask, size, model.mask_prob)
        case Seq2SeqConfig() if end is not None:
            return TextPairs(texts[0], texts[1], end)
    raise TypeError(f"there are no examples for a {type(model).__name__}")


def _texts(task: str) -> int:
    """How many texts an example has."""
    return 2 if task == "translation" else 1


def key(table: Table, config: Config, *others: object) -> str:
    """The digest of all that the tokens of a table depend on."""
    data = config.data
    suffixes = [Path(path).suffix for path in data.path] or data.corpus
    values = FORMAT, config.model.task, table.sha256, suffixes, *others
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
