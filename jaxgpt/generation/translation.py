"""Translation of texts by a run of an encoder-decoder."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgpt.generation.beam import beam_search
from jaxgpt.generation.decode import MIN_ROWS_PER_DEVICE
from jaxgpt.parallel.mesh import data_parallel_mesh, replicated
from jaxgpt.run import Run, check_call, require_task, text_tokenizer
from jaxgpt.text.examples import Sequences
from jaxgpt.text.pairs import encode_sources

# Source: "Attention Is All You Need" (Vaswani et al. 2017), section 6.1.
BEAMS, LENGTH_PENALTY = 4, 0.6
BATCH_SIZE = 32


def translate(
    run: Run,
    texts: Sequence[str],
    *,
    beams: int = BEAMS,
    length_penalty: float = LENGTH_PENALTY,
    batch_size: int = BATCH_SIZE,
    log: Callable[[str], None] | None = None,
) -> list[str]:
    """Translates each text by beam search; a blank text gives an empty one.

    Special tokens in a text are text. A text longer than block_size is cut.

    Args:
      run: the result of `load_run`, of an encoder-decoder.
      texts: the sources.
      beams: hypotheses of the beam search for each text; 1 is greedy.
      length_penalty: larger values favour longer outputs; 0 compares probabilities.
      batch_size: texts at once; does not affect the result.
      log: told how many texts are cut, and which characters are left out since a
        tokenizer of characters does not have them.

    Raises ValueError if an argument is out of range, or the run has no tokenizer or is
    of another kind of model, and TypeError for values of another type.
    """
    texts = check_call(run, texts, beams=beams, batch_size=batch_size)
    if not isinstance(length_penalty, int | float):
        raise TypeError(f"length_penalty={length_penalty!r} must be float")
    block_size = require_task(run.config, "translation").block_size
    tokenizer, filled = text_tokenizer(run), [text for text in texts if text.strip()]
    sources = encode_sources(filled, tokenizer, block_size, log)
    batch_size = batch_size if len(filled) > 1 else 1
    search = int(beams), length_penalty, int(batch_size)
    outputs = iter(translate_tokens(run, sources, *search))
    return [next(outputs) if text.strip() else "" for text in texts]


def translate_tokens(
    run: Run,
    sources: Sequences,
    beams: int,
    length_penalty: float,
    batch_size: int,
    mesh: Mesh | None = None,
    advance: Callable[[int], object] = lambda sources: None,
) -> list[str]:
    """Translates sources that are token ids, each with the end-of-text token.

    Args:
      mesh: the mesh that the run was loaded on, over which a batch is sharded; by
        default this process's devices, if there are enough sources.
      advance: called with the number of sources in each batch, to show progress.
    """
    tokenizer, params = text_tokenizer(run), run.params
    end: Any = tokenizer.end_of_text
    if mesh is None:
        rows = batch_size, MIN_ROWS_PER_DEVICE
        mesh = data_parallel_mesh(run.model.config, params, *rows)
        params = jax.device_put(params, replicated(mesh)) if mesh else params
    found = beam_search(
        run.model,
        params,
        sources,
        end,
        beams=beams,
        length_penalty=length_penalty,
        batch_size=batch_size,
        mesh=mesh,
        advance=advance,
    )
    return [tokenizer.decode(tokens[tokens != end]) for tokens, _, _ in found]
