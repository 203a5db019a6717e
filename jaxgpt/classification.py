"""Classifies texts with a run.

N texts   K labels
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxgpt.run import Run, check_call, require_task, text_tokenizer
from jaxgpt.text.examples import LabelledTexts
from jaxgpt.text.labelled import encode_texts
from jaxgpt.training.evaluation import label_log_probs


def classify(
    run: Run,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    log: Callable[[str], None] | None = None,
) -> np.ndarray:
    """The probability of each label for each text, f32 [N, K].

    Labels are in the order of `run.config.model.labels`. Of a text that is longer than
    block_size, the first and the last half of the tokens count, as in training.

    Args:
      run: the result of `load_run`.
      texts: N texts, which may be empty.
      batch_size: texts at once; does not affect the result.
      log: told how many texts are cut, and which characters are left out since a
        tokenizer of characters does not have them.

    Raises ValueError if the run is no classifier or has no tokenizer, and TypeError for
    values of another type.
    """
    texts = check_call(run, texts, batch_size=batch_size)
    model = require_task(run.config, "classification")
    tokenizer, N = text_tokenizer(run), len(texts)
    if not N:
        return np.zeros((0, len(model.labels)), np.float32)
    sequences = encode_texts(texts, tokenizer, model.block_size, log)
    examples = LabelledTexts(sequences, np.zeros(N, np.int32), np.full(N, ""))
    data = dataclasses.replace(
        run.config.data, batch_size=batch_size, gradient_accumulation_steps=1
    )
    config = dataclasses.replace(run.config, data=data)
    mesh = jax.tree.leaves(run.params)[0].sharding.mesh
    return np.exp(label_log_probs(run.model, run.params, examples, config, mesh))
