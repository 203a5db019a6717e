"""Translates texts: python -m jaxgpt translate --run-dir DIR [TEXT ...]."""

from functools import partial
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from jaxgpt.commands.texts import given_texts
from jaxgpt.generation import translation
from jaxgpt.generation.translation import BATCH_SIZE, BEAMS, LENGTH_PENALTY
from jaxgpt.run import load_config, load_run, require_task
from jaxgpt.terminal import log_line


def translate(
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT")] = (),
    *,
    run_dir: Path,
    checkpoint: str = "best",
    beams: int = BEAMS,
    length_penalty: float = LENGTH_PENALTY,
) -> int:
    """Prints a line for each text, its translation by beam search.

    Args:
        texts: texts to translate; by default each line of stdin; an empty one gives an
            empty line
        run_dir: run directory written by train.py, of an encoder-decoder
        checkpoint: best (lowest val loss), latest, or a step
        beams: translations of each text that are kept while searching; 1 is greedy
        length_penalty: larger values favour longer translations; 0 compares
            probabilities
    """
    require_task(load_config(run_dir), "translation")
    run = load_run(run_dir, checkpoint)
    search = partial(
        translation.translate,
        run,
        beams=beams,
        length_penalty=length_penalty,
        log=log_line,
    )
    for batch in given_texts(texts, BATCH_SIZE):
        for output in search(batch):
            print(" ".join(output.splitlines()), flush=True)
    return 0
