"""Corpora of conversations, prompts, preferences, and examples of other tasks.

Their tokens are cached, so the files are read only if they, the tokenizer or block_size
have changed.
"""

import hashlib
import json
import shlex
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from operator import itemgetter
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
from jaxgpt.text import (
    assistant,
    conversations,
    labelled,
    pairs,
    preferences,
    pretrained,
)
from jaxgpt.text.examples import (
    Examples,
    LabelledTexts,
    MaskedTexts,
    Sequences,
    TextPairs,
)
from jaxgpt.text.tables import SPLITS, Log, Row, Table
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    MASK,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    token_dtype,
)

# The built-in corpora of each kind; see `kind_of`.
CORPORA = {
    "next-token": ("tinyshakespeare", "reviews"),
    "classification": ("reviews",),
    "masked-tokens": ("reviews",),
    "translation": ("tatoeba", "reverse"),
    "conversations": ("chitchat", "assistant"),
    "preferences": (),
    "prompts": ("assistant",),
}
# To raise when the same files give other rows, splits, labels or tokens than before.
_FORMAT = 1
Arrays = dict[str, Any]
# By kind of corpus, the special tokens if there are others than END_OF_TEXT, and what
# gives the texts of a row if not only the first string is one.
_SPECIAL = {
    "masked-tokens": (END_OF_TEXT, MASK),
    "conversations": conversations.CHAT_TOKENS,
}
_TEXTS: dict[str, Callable[[Row], Sequence[str]]] = {
    "translation": itemgetter(slice(2)),
    "conversations": itemgetter(slice(1, None)),
    "preferences": preferences.texts_of,
    "prompts": preferences.texts_of,
}


def kind_of(config: Config) -> str:
    """The kind of corpus: the model's task, or "prompts", "preferences"...

    PPO needs prompts, DPO and reward models need preferences, and other models with
    packing=conversations need these.
    """
    if config.rewarded:
        return "prompts"
    if config.dpo or config.model.task == "reward":
        return "preferences"
    is_chat = config.data.packing == "conversations"
    return "conversations" if is_chat else config.model.task


def check_corpus(config: Config) -> None:
    """Raises ValueError if settings of the corpus are for another task or corpus."""
    data, kind = config.data, kind_of(config)
    if not data.path and not CORPORA[kind]:
        raise ValueError(f"there is no built-in corpus of {kind}; give --data.path")
    if not data.path and data.corpus not in CORPORA[kind]:
        setting = f"architecture={config.model.architecture}"
        if kind == "conversations":
            setting = f"packing={kind}"
        if kind == "prompts":
            setting = "PPO and GRPO"
        raise ValueError(
            f"--data.corpus {data.corpus} does not fit {setting}; use --data.corpus "
            f"{' or '.join(CORPORA[kind])}, or your own --data.path"
        )
    if data.languages != DataConfig().languages and (
        data.path or data.corpus != "tatoeba"
    ):
        raise ValueError(
            f"--data.languages {data.languages} is for --data.corpus tatoeba, not for "
            f"{', '.join(data.path) or data.corpus}; omit it"
        )
    is_tokens = kind in ("next-token", "conversations")
    if config.model.block_size < 2 and not is_tokens:
        raise ValueError(
            f"block_size={config.model.block_size} has no room for a text beside the "
            "end-of-text token; raise --model.block-size"
        )
    if data.weights and not is_tokens:
        raise ValueError(
            f"--data.weights are for folders of tokens, not for {kind}; omit them"
        )


def open_table(kind: str, data: DataConfig, log: Log) -> Table:
    """Finds a corpus of a kind; raises OSError or ValueError if it can't be used."""
    if (data.corpus, data.path) == ("assistant", ()):
        table = assistant.open_assistant(kind, log)
    elif kind == "translation":
        table = pairs.open_pairs(data, log)
    elif kind == "conversations":
        table = conversations.open_conversations(data, log)
    elif kind in ("preferences", "prompts"):
        table = preferences.open_preferences(data, kind == "preferences")
    else:
        table = labelled.open_labelled(data, kind == "classification", log)
    return replace(table, read=cache(table.read))


def make_tokenizer(table: Table, config: Config, log: Log) -> Tokenizer:
    """Makes the tokenizer that `data.tokenizer` names, with the special tokens needed.

    The characters or the BPE are those of the training part.
    """
    name, kind = config.data.tokenizer, kind_of(config)
    special = _SPECIAL.get(kind, (END_OF_TEXT,))
    if kind in ("preferences", "prompts") and config.train.init_from:
        special = ()  # the tokenizer is the run's, whose model has no other tokens
    if name not in ("char", "bpe"):
        return pretrained.find_tokenizer(name, log).with_special(special)
    size = config.model.vocab_size if name == "bpe" else 0
    file_name = f"{_key(table, config)}-{name}-{size}.json"
    path = cache_dir() / "tokenizers" / file_name
    with suppress(OSError, ValueError):  # it is missing or damaged
        return load_tokenizer(path)
    rows, split_N = table.read()
    texts = [
        text
        for row, split in zip(rows, split_N, strict=True)
        if SPLITS[split] == "train"
        for text in _TEXTS.get(kind, itemgetter(slice(1)))(row)
    ]
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


def tokenize(table: Table, config: Config, tokenizer: Tokenizer, log: Log) -> Arrays:
    """Tokenizes a table, unless it is cached; returns arrays for `make_examples`.

    These are token ids and offsets of each text, the ids of the labels and their names,
    the sources, the index of each example's split, and what was logged of the texts,
    such as how many were cut, which is logged again if they are cached.
    """
    key = _key(table, config, config.model.block_size, tokenizer.to_json())
    path = cache_dir() / "examples" / f"{key}.npz"
    # Missing or damaged; NumPy raises these, and zipfile checks each array.
    damage = OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error
    with suppress(*damage), path.open("rb") as file:
        arrays = dict(np.load(file))
        for line in arrays["log"].tolist():
            log(line)
        return arrays
    rows, split_N = table.read()
    log(f"tokenizing {len(rows):,} examples into {path}")
    kind, block_size = kind_of(config), config.model.block_size
    sequences, others, lines = [], Arrays(), list[str]()

    def tell(line: str) -> None:
        lines.append(f"all splits: {line}")

    settings = tokenizer, block_size, tell
    texts = [] if kind == "conversations" else list(zip(*rows, strict=True))
    if kind in ("preferences", "prompts"):
        others = preferences.tokenize(rows, tokenizer, config, tell)
    elif kind == "conversations":
        others = conversations.tokenize(rows, tokenizer, tell)
    elif kind == "masked-tokens":
        pieces, of_text = labelled.encode_pieces(texts[0], *settings)
        sequences, split_N = [pieces], split_N[of_text]
    elif kind == "classification":
        sequences = [labelled.encode_texts(texts[0], *settings)]
        _, labels, sources = zip(*rows, strict=True)
        names, ids = np.unique(labels, return_inverse=True)
        others = {"names": names, "labels": ids, "sources": np.array(sources)}
    else:
        sequences = [
            pairs.encode_sources(each, *settings, name)
            for each, name in zip(texts, ("sources", "targets"), strict=True)
        ]
    for line in lines:
        log(line)
    arrays = others | {"split": split_N, "log": np.array(lines, str)}
    for n, each in enumerate(sequences):
        tokens = each.tokens.astype(token_dtype(tokenizer.vocab_size))
        arrays |= {f"tokens{n}": tokens, f"offsets{n}": each.offsets}

    def save(tmp_path: Path) -> None:
        with tmp_path.open("wb") as file:
            np.savez(file, **arrays)

    replace_file(path, save)
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
        for n in range(2 if model.task == "translation" else 1)
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


def _key(table: Table, config: Config, *others: object) -> str:
    """The digest of all that the rows depend on, and of others."""
    data = config.data
    suffixes = [Path(path).suffix for path in data.path] or data.corpus
    kind = kind_of(config)
    if kind in ("preferences", "prompts"):
        others = *others, data.packing
    values = _FORMAT, kind, table.sha256, suffixes, *others
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
