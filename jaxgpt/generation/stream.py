"""Text generation from a run, all at once or streamed."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jaxgpt.config import SamplingConfig
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.run import Run, check_call, prompt_tokens, require_task, text_tokenizer
from jaxgpt.text.tokenizer import Tokenizer


def generate(
    run: Run,
    prompt: str,
    *,
    max_new_tokens: int = 500,
    num_samples: int = 1,
    temperature: float = SamplingConfig.temperature,
    top_k: int | None = SamplingConfig.top_k,
    top_p: float | None = SamplingConfig.top_p,
    seed: int = 1337,
    stop: str = "",
) -> list[str]:
    """Continues `prompt`; returns one continuation per sample, without the prompt.

    Args:
      run: the result of `load_run`.
      prompt: the text to continue, as in `stream_text`.
      max_new_tokens: tokens to generate for each sample.
      num_samples: number of samples.
      temperature: 0 is greedy, 1 keeps the model's probabilities.
      top_k: draw from the k likeliest tokens; by default from all.
      top_p: draw from the likeliest tokens of total probability p; by default from all.
      seed: the same seed gives the same texts.
      stop: a sample ends before the first occurrence of this text, if it is not empty.

    Raises ValueError as `stream_text` does, and TypeError for a value of another type.
    """
    new_texts = stream_text(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        sampling=SamplingConfig(temperature, top_k, top_p),
        seed=seed,
        stop=stop,
    )
    return ["".join(texts) for texts in zip(*new_texts, strict=True)]


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
    """Continues `prompt`; yields the new text of each sample a few tokens at a time.

    Args:
      prompt: as in `prompt_tokens`; the model sees the last block_size tokens.
        <|endoftext|> is read as the end-of-text token, if any, as in nanoGPT, and so
        are other tokens that were added to an imported tokenizer.
      stop: a sample ends before the first occurrence of this text; empty disables it.
        A sample also ends before the tokenizer's end-of-text token.

    Yields lists of num_samples strings. A character is held back until all its tokens
    are sampled; bytes that never complete one become U+FFFD, as in `decode`. Raises
    ValueError if an argument is out of range, a character is not in the vocabulary, or
    the run has no tokenizer or is no language model.
    """
    numbers = {"max_new_tokens": max_new_tokens, "num_samples": num_samples}
    check_call(run, seed=seed, **numbers)
    for name, text in (("prompt", prompt), ("stop", stop)):
        if not isinstance(text, str):
            raise TypeError(f"{name}={text!r} must be str")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1")
    require_task(run.config, "next-token")
    tokenizer, (_, ids) = text_tokenizer(run), prompt_tokens(run, prompt)
    tokenizer.encode(stop)  # raises if a character is unknown: it could never match
    ends = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    drawn_tokens = generate_tokens(
        run.model,
        run.params,
        [ids.tolist()] * num_samples,
        max_new_tokens,
        sampling,
        seed,
        ends,
    )
    yield from decode_stream(tokenizer, drawn_tokens, num_samples, ends, stop)


def decode_stream(
    tokenizer: Tokenizer,
    drawn_tokens: Iterable[tuple[np.ndarray, np.ndarray]],
    num_samples: int,
    ends: Sequence[int],
    stop: str = "",
) -> Iterator[list[str]]:
    """Decodes tokens as they are drawn; yields the new text of each sample.

    Args:
      drawn_tokens: of `generate_tokens`.
      ends: a sample ends before the first of these tokens.
      stop: a sample ends before the first occurrence of this text; empty disables it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")
    decoders = [decoder("replace") for _ in range(num_samples)]
    pending, done = [""] * num_samples, [False] * num_samples
    for tokens, _ in drawn_tokens:
        texts = [""] * num_samples
        for row, utf8 in enumerate(decoders):
            if done[row]:
                continue
            drawn = list(
                itertools.takewhile(lambda token: token not in ends, tokens[row])
            )
            text = pending[row] + utf8.decode(tokenizer.decode_bytes(drawn))
            texts[row], pending[row], stopped = _split_at_stop(text, stop)
            if stopped:
                utf8.reset()  # its pending bytes come after `stop`
            done[row] = stopped or len(drawn) < len(tokens[row])
        yield texts
        if all(done):
            break
    for row, utf8 in enumerate(decoders):
        pending[row] += utf8.decode(b"", final=True)
    yield pending


def _split_at_stop(text: str, stop: str) -> tuple[str, str, bool]:
    """The text before `stop`, a suffix that may begin it, and whether it was found."""
    if stop and stop in text:
        return text[: text.index(stop)], "", True
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return text[:-length], text[-length:], False
    return text, "", False
