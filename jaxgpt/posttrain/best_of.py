"""Best-of-n: of several responses to a prompt, the one with the highest reward.

B responses
"""

from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import SamplingConfig
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.posttrain.rewards import score
from jaxgpt.posttrain.rollout import Rollout
from jaxgpt.run import Run, prompt_tokens, require_task, text_tokenizer
from jaxgpt.text.examples import Sequences
from jaxgpt.text.tokenizer import Tokenizer


class Best(NamedTuple):
    """The best of several continuations, and the reward of prompt and continuation."""

    text: str
    reward: float


def best_of(
    run: Run,
    judge: Run,
    prompt: str,
    n: int,
    *,
    max_new_tokens: int = 500,
    num_samples: int = 1,
    sampling: SamplingConfig | None = None,
    seed: int = 1337,
    stop: str = "",
) -> list[Best]:
    """Continues a prompt n times; returns the continuation with the highest reward.

    The reward is of the tokens of prompt and text, without an end-of-text token at the
    end; the last block_size of the reward model, if there are more.

    Args:
      run: the language model.
      judge: the reward model, with the same tokenizer.
      n: continuations of which one is returned; they differ as samples do.
      num_samples: how often to do this; each has n continuations of its own.
      max_new_tokens, sampling, seed, stop: as in `stream_text`.

    Raises ValueError if a run is of another kind, if the tokenizers differ, or as
    `stream_text` does.
    """
    for name, number in (("best_of", n), ("num_samples", num_samples)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    require_task(run.config, "next-token")
    T = require_task(judge.config, "reward").block_size
    tokenizer = text_tokenizer(run)
    if tokenizer.to_json() != text_tokenizer(judge).to_json():
        raise ValueError(
            "the reward model has another tokenizer than the run, so it can't read the "
            "run's tokens; give one that was trained from this run with --init-from"
        )
    tokenizer.encode(stop)  # raises if a character is unknown: it could never match
    ids = prompt_tokens(run, prompt)[1].tolist()
    ends = () if tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    drawn = generate_tokens(
        *(run.model, run.params, [ids] * (n * num_samples), max_new_tokens),
        *(sampling, seed, ends),
    )
    tokens = np.concatenate([np.zeros((n * num_samples, 0)), *(t for t, _ in drawn)], 1)
    found = [_cut(tokenizer, row, ends, stop) for row in tokens.astype(int).tolist()]
    rows = [(ids + response)[-T:] for response, _ in found]
    lengths_B = np.array([*map(len, rows)], np.int32)
    counts_B = np.minimum([len(response) for response, _ in found], lengths_B)
    ended_B = np.zeros(len(rows), bool)
    tokens_BT = Sequences.join(rows).padded(np.arange(len(rows)), int(lengths_B.max()))
    rolled: Any = tokens_BT, lengths_B - counts_B, counts_B, ended_B
    reward_B = score(judge, Rollout(*rolled))
    return [Best(found[b][1], float(reward_B[b])) for b in best_rows(reward_B, n)]


def best_rows(reward_B: np.ndarray, n: int) -> np.ndarray:
    """The row with the highest reward of each n rows that follow each other, [B / n].

    With `respond` and `score`, and each prompt n times, these are best-of-n.
    """
    return reward_B.reshape(-1, n).argmax(axis=1) + np.arange(0, len(reward_B), n)


def _cut(
    tokenizer: Tokenizer, drawn: list[int], ends: tuple[int, ...], stop: str
) -> tuple[list[int], str]:
    """The tokens that begin before an end token and before `stop`, and their text."""
    first_end = next((i for i, token in enumerate(drawn) if token in ends), len(drawn))
    pieces = [tokenizer.decode_bytes([token]) for token in drawn[:first_end]]
    utf8 = b"".join(pieces)
    if stop and (place := utf8.find(stop.encode())) >= 0:
        utf8 = utf8[:place]
    begins = np.cumsum([0, *map(len, pieces)])[:-1]
    count = int((begins < len(utf8)).sum())
    return drawn[:count], utf8.decode("utf-8", "replace")
