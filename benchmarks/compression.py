"""Bits per byte of a run on its validation text, beside a trigram's and those of xz.

python -m benchmarks.compression --run-dir RUN

- model: the run's exact loss on the validation split, over its bytes.
- trigram: a byte trigram, interpolated with bigram, unigram and uniform probabilities
  (Jelinek-Mercer). Its counts are those of the training text; its weights are fitted by
  EM on a tenth of the training documents, with the counts of the others.
- xz: the validation text, compressed alone.
- xz, primed: what the validation text adds to the size of the compressed training text.

If documents have ends, the model and the trigram predict these too: an end adds to
their bits, but is no byte. xz is not told where documents end. The text, of at most
some hundred MB, is decoded from the run's tokens. Writes a report if --out is given.
"""

import io
import json
import lzma
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tyro

from benchmarks.rounds import Facts, machine, write_json

END = 256  # the end of a document, and what comes before its first bytes
SYMBOLS = 257
_CHUNK = 1 << 22  # tokens or symbols at once
_BLOCK = 1 << 12  # symbols that are held out together where there are few documents
_ROUNDS = 100  # of EM

T = TypeVar("T")


@dataclass(frozen=True)
class Arguments:
    """Compares a run's bits per byte with those of a byte trigram and of xz."""

    run_dir: Path  # written by train.py
    checkpoint: str = "best"  # best, latest or a step
    out: Path | None = None  # the report, as JSON


def main() -> None:
    """Measures, prints a table and writes the report."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.compression")
    from jaxgpt import start

    start.start()
    report = machine("benchmarks.compression", "gpu") | measure(**vars(arguments))
    print(f"{'':16}{'bits per byte':>14}{'seconds':>9}")
    for name, bits in report["bits_per_byte"].items():
        print(f"{name:16}{bits:14.4f}{report['seconds'][name]:9.1f}")
    if arguments.out:
        write_json(arguments.out, report)


def measure(run_dir: Path, checkpoint: str, out: Path | None = None) -> Facts:
    """Returns the bits per byte of all, and what they were measured on."""
    from jaxgpt.run import load_config, saved_tokenizer
    from jaxgpt.terminal import log_line
    from jaxgpt.text.corpus import load_corpus

    if not (tokenizer := saved_tokenizer(run_dir)):
        sys.exit(f"{run_dir} has no tokenizer.json, so its tokens can't be decoded")
    corpus, _ = load_corpus(load_config(run_dir), log_line, tokenizer)
    train, val = (decode(each, tokenizer) for each in (corpus.train, corpus.val))
    texts = to_bytes(train), to_bytes(val)
    sizes = {"train_bytes": len(texts[0]), "val_bytes": len(texts[1])}
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., T], *arguments: Any) -> T:
        started = time.perf_counter()
        found = function(*arguments)
        seconds[name] = time.perf_counter() - started
        return found

    evaluated = timed("model", evaluate_run, run_dir, checkpoint)
    first = len(corpus.val) - evaluated["tokens"]  # the first token is not predicted
    predicted = len(texts[1]) - len(to_bytes(decode(corpus.val[:first], tokenizer)))
    weights, trigram = timed("trigram", trigram_bits, train, val)
    xz, primed = timed("xz", xz_bits, *texts)
    seconds["xz, primed"] = seconds["xz"]
    bits = {
        "model": evaluated["tokens"] * evaluated["nats_per_token"] / math.log(2),
        "trigram": trigram,
        "xz": xz,
        "xz, primed": primed,
    }
    per_byte = {name: value / len(texts[1]) for name, value in bits.items()}
    per_byte["model"] = bits["model"] / predicted
    return {
        "run_dir": str(run_dir),
        "checkpoint": checkpoint,
        "val_documents": int((val == END).sum()),
        **sizes,
        "evaluation": evaluated,
        "trigram_weights": weights,
        "bits_per_byte": per_byte,
        "seconds": seconds,
    }


def evaluate_run(run_dir: Path, checkpoint: str) -> Facts:
    """Returns what `python -m jaxgpt evaluate --json` prints of the val split."""
    from jaxgpt.commands.evaluate import evaluate

    with redirect_stdout(io.StringIO()) as printed:
        evaluate(run_dir, checkpoint, "val", json=True)
    return json.loads(printed.getvalue())


def decode(tokens: Any, tokenizer: Any) -> np.ndarray:
    """The bytes of token ids, with END for end-of-text tokens, u16 [symbols]."""
    size = tokenizer.vocab_size
    table = [tokenizer.decode_bytes([id_]).decode("latin-1") for id_ in range(size)]
    if tokenizer.end_of_text is not None:
        table[tokenizer.end_of_text] = chr(END)
    pieces = [np.empty(0, "<u2")]
    for start in range(0, len(tokens), _CHUNK):
        text = "".join(map(table.__getitem__, tokens[start : start + _CHUNK].tolist()))
        pieces.append(np.frombuffer(text.encode("utf-16-le"), "<u2"))
    return np.concatenate(pieces)


def to_bytes(symbols: np.ndarray) -> bytes:
    """The text of symbols, without ends of documents."""
    return symbols[symbols != END].astype(np.uint8).tobytes()


def trigram_bits(train: np.ndarray, val: np.ndarray) -> tuple[list[float], float]:
    """Fits a trigram on a text; returns its weights, and its bits for another text."""
    is_held_out = held_out(train)
    kept, held = (count(train[part]) for part in (~is_held_out, is_held_out))
    weights = fit_weights(kept, held)
    of_val = count(val)
    seen = np.flatnonzero(of_val)
    probs = weights @ components(kept + held, seen)
    return weights.tolist(), float(-(of_val.ravel()[seen] * np.log2(probs)).sum())


def held_out(symbols: np.ndarray) -> np.ndarray:
    """Which symbols are of every tenth document, bool [symbols].

    Of fewer than 100 documents, blocks of the text take the place of documents.
    """
    is_end = symbols == END
    if is_end.sum() >= 100:
        document = np.cumsum(is_end, dtype=np.int32) - is_end
    else:
        block = min(_BLOCK, -(-len(symbols) // 10))
        document = np.arange(len(symbols), dtype=np.int32) // block
    return document % 10 == 9


def count(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol follows each two others, i64 [257, 257, 257].

    A document's first symbol follows END twice, and its second END and the first.
    """
    counts = np.zeros(SYMBOLS**3, np.int64)
    padded = np.concatenate([[END, END], symbols]).astype(np.int32)
    for start in range(0, len(symbols), _CHUNK):
        last = min(start + _CHUNK, len(symbols))
        first, second, third = (padded[i + start : i + last] for i in range(3))
        first = np.where(second == END, END, first)
        keys = (first * SYMBOLS + second) * SYMBOLS + third
        counts += np.bincount(keys, minlength=SYMBOLS**3)
    return counts.reshape(SYMBOLS, SYMBOLS, SYMBOLS)


def components(counts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Uniform, unigram, bigram and trigram probabilities, f64 [4, keys].

    Those of a context that was never seen are those of the next shorter one.

    Args:
      counts: the result of `count`.
      keys: (first * 257 + second) * 257 + third of each trigram that is wanted.
    """
    first, second, third = np.unravel_index(keys, counts.shape)
    probs = [np.full(len(keys), 1 / SYMBOLS)]
    for seen, context in (
        (counts.sum((0, 1))[third], counts.sum()),
        (counts.sum(0)[second, third], counts.sum((0, 2))[second]),
        (counts[first, second, third], counts.sum(2)[first, second]),
    ):
        probs.append(np.where(context, seen / np.maximum(context, 1), probs[-1]))
    return np.stack(probs)


def fit_weights(counts: np.ndarray, held: np.ndarray) -> np.ndarray:
    """The weights of the components that make other counts likeliest, f64 [4].

    One count is added for each component, so that no symbol has probability 0.

    Source: Jelinek and Mercer 1980, "Interpolated estimation of Markov source
    parameters from sparse data"; EM for the weights of a mixture.
    """
    keys = np.flatnonzero(held)
    probs, times = components(counts, keys), held.ravel()[keys]
    weights = np.full(4, 1 / 4)
    for _ in range(_ROUNDS):
        parts = weights[:, None] * probs
        weights = (parts / parts.sum(0) @ times + 1) / (times.sum() + 4)
    return weights


def xz_bits(train: bytes, val: bytes) -> tuple[int, int]:
    """Bits of `val` compressed alone, and of what it adds to `train` compressed.

    Raises lzma.LZMAError if they have more than 1.5 GiB, the largest dictionary.
    """
    size = max(len(train) + len(val), 4096)
    xz = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    xz[0]["dict_size"] = size

    def bits(text: bytes) -> int:
        return 8 * len(lzma.compress(text, filters=xz))

    with ThreadPoolExecutor() as threads:  # lzma releases the GIL
        alone, both, before = threads.map(bits, (val, train + val, train))
    return alone, both - before


if __name__ == "__main__":
    main()
