"""A run becomes text, as it is drawn."""

from collections.abc import Iterator

from jaxgpt.config import SamplingConfig
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.run import Run
from jaxgpt.text.tokenizer import CharTokenizer


def generate(run: Run, prompt: str, **options: object) -> list[str]:
    """Continues `prompt`; takes the options of `stream_text`.

    Returns the continuations without the prompt, one for each sample.
    """
    pieces = list(stream_text(run, prompt, **options))  # type: ignore[arg-type]
    return ["".join(texts) for texts in zip(*pieces, strict=True)]


def stream_text(
    run: Run,
    prompt: str,
    *,
    max_new_tokens: int = 500,
    num_samples: int = 1,
    sampling: SamplingConfig | None = None,
    seed: int = 1337,
    stop: str = "",
) -> Iterator[list[str]]:
    """Continues `prompt`, and yields new text of each sample a few tokens at a time.

    Args:
      run: from `load_run`.
      prompt: empty stands for `empty_prompt`; the model sees its last tokens only.
      max_new_tokens: to draw for each sample.
      num_samples: continuations to draw at once.
      sampling: how tokens are drawn.
      seed: the same seed gives the same text.
      stop: a sample ends before this text, once it is drawn; empty never ends one.

    Yields lists of num_samples strings. Raises ValueError where an argument is out of
    range, a character is not in the vocabulary, or the run has no tokenizer.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    if run.tokenizer is None:
        raise ValueError(
            "the run has no tokenizer.json, and can't read a prompt or write text; one "
            "trained on text gets it back with `python train.py --resume`"
        )
    ids = run.tokenizer.encode(prompt or empty_prompt(run.tokenizer)).tolist()
    run.tokenizer.encode(stop)  # which it could never meet, were a character unknown
    tokens = generate_tokens(
        run.model, run.params, [ids] * num_samples, max_new_tokens, sampling, seed
    )
    held, done = [""] * num_samples, [False] * num_samples
    for piece in tokens:
        texts = []
        for row in range(num_samples):
            new = "" if done[row] else run.tokenizer.decode(piece[row])
            text, held[row], found = _until_stop(held[row] + new, stop)
            done[row] = done[row] or found
            texts.append(text)
        yield texts
        if all(done):
            break
    yield held


def empty_prompt(tokenizer: CharTokenizer) -> str:
    """What an empty prompt stands for: a newline, or else the first character known."""
    return "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]


def _until_stop(text: str, stop: str) -> tuple[str, str, bool]:
    """Splits off what may be the beginning of `stop`; tells whether it came whole."""
    if not stop:
        return text, "", False
    if stop in text:
        return text[: text.index(stop)], "", True
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return text[:-length], text[-length:], False
    return text, "", False
