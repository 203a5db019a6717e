"""What `evaluate` reports of an encoder-decoder."""

import math
from itertools import zip_longest
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.generation.translation import BEAMS, LENGTH_PENALTY, translate_tokens
from jaxgpt.run import Run, text_tokenizer
from jaxgpt.terminal import log_line, progress
from jaxgpt.text.examples import TextPairs
from jaxgpt.training.evaluation import evaluate_examples, make_eval_step
from jaxgpt.training.objectives import make_objective


def evaluate_pairs(
    run: Run,
    pairs: TextPairs,
    config: Config,
    mesh: Mesh,
    beams: int = BEAMS,
    length_penalty: float = LENGTH_PENALTY,
) -> dict[str, Any]:
    """The loss of the targets, and how near the translations come to them.

    Each source is translated once, and all its targets are references, as the model
    reads them: cut to block_size (`load_split` logs how many are). Of the same
    references, `copy_bleu` and `copy_chrf` are the scores of the sources themselves.

    Args:
      run: a run of an encoder-decoder, loaded on `mesh`.
      pairs: the examples, whose texts are cut to block_size.
      config: gives the number of rows per batch.
      beams, length_penalty: as in `translate`.
    """
    eval_step = make_eval_step(make_objective(run.model), mesh)
    with progress("evaluating", len(pairs)) as advance:
        batches = eval_step, run.params, pairs, config, mesh, advance
        loss = evaluate_examples(*batches)["loss"]
    decode, is_first_N = text_tokenizer(run).decode, np.zeros(len(pairs), bool)
    references: dict[bytes, list[str]] = {}
    for row in range(len(pairs)):
        of_source = references.setdefault(pairs.sources[row].tobytes(), [])
        is_first_N[row] = not of_source
        of_source.append(decode(pairs.targets[row][:-1]))
    sources = pairs.sources.select(is_first_N)
    log_line(f"translating {len(sources):,} sources")
    with progress("translating", len(sources)) as advance:
        outputs = translate_tokens(
            run, sources, beams, length_penalty, config.data.batch_size, mesh, advance
        )
    targets = list(references.values())
    exact = sum(output in each for output, each in zip(outputs, targets, strict=True))
    report = {
        "pairs": len(pairs),
        "tokens": int(pairs.targets.lengths.sum()),
        "nats_per_token": loss,
        "perplexity": math.exp(loss),
        "sources": len(sources),
        "beams": beams,
        "length_penalty": length_penalty,
        "exact_match": exact / len(sources),
    }
    copies = [decode(sources[row][:-1]) for row in range(len(sources))]
    return report | scores(outputs, copies, targets)


def scores(
    outputs: list[str], copies: list[str], references: list[list[str]]
) -> dict[str, Any]:
    """BLEU and chrF of the outputs and of copies of the sources, with signatures.

    Args:
      references: one or more for each output.
    """
    from sacrebleu.metrics import BLEU, CHRF  # needed only here

    # One stream for the first reference of each source, one for the second, and so on.
    streams = [*zip_longest(*references)]
    found: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(outputs, streams).score
        found[f"copy_{name}"] = metric.corpus_score(copies, streams).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found
