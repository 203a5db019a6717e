"""Classifies texts: python -m jaxgpt classify --run-dir DIR [TEXT ...]."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxgpt import classification
from jaxgpt.commands.texts import given_texts
from jaxgpt.run import load_config, load_run, require_task
from jaxgpt.terminal import log_line

_BATCH = 16


def classify(
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT")] = (),
    *,
    run_dir: Path,
    checkpoint: str = "best",
) -> int:
    """Prints the likeliest label of each text and its probability, with a tab between.

    Args:
        texts: texts to classify; by default each line of stdin, an empty one too
        run_dir: run directory written by train.py, of a classifier
        checkpoint: best (lowest val loss), latest, or a step
    """
    labels = require_task(load_config(run_dir), "classification").labels
    run = load_run(run_dir, checkpoint)
    for batch in given_texts(texts, _BATCH):
        probs_NK = classification.classify(run, batch, batch_size=_BATCH, log=log_line)
        for probs_K in probs_NK:
            label = " ".join(labels[probs_K.argmax()].split())  # a line of two columns
            print(f"{label}\t{probs_K.max():.4f}", flush=True)
    return 0
