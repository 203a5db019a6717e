"""Best-of-n: of several responses to a prompt, the one with the highest reward.

B responses
"""

from typing import NamedTuple

import numpy as np

from jaxgpt.config import SamplingConfig
from jaxgpt.generation.stream import generate
from jaxgpt.posttrain.rewards import check_same_tokenizer, score_texts
from jaxgpt.run import Run, prompt_tokens, require_task, text_tokenizer
from jaxgpt.text.examples import Sequences


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

    The reward is of prompt and text, without an end-of-text token at the end; of their
    last block_size tokens, if there are more.

    Args:
      run: the language model.
      judge: the reward model, with the same tokenizer.
      n: continuations of which one is returned; they differ as samples do.
      num_samples: how often to do this; each has n continuations of its own.
      max_new_tokens, sampling, seed, stop: as in `generate`.

    Raises ValueError if a run is of another kind, if the tokenizers differ, or as
    `generate` does.
    """
    if n < 1:
        raise ValueError(f"best_of={n} must be at least 1")
    T = require_task(judge.config, "reward").block_size
    check_same_tokenizer(text_tokenizer(judge), text_tokenizer(run))
    texts = generate(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        num_samples=n * num_samples,
        **vars(sampling or SamplingConfig()),
        seed=seed,
        stop=stop,
    )
    prompt, _ = prompt_tokens(run, prompt)
    rows = [prompt_tokens(run, prompt + text)[1][-T:] for text in texts]
    reward_B = score_texts(judge, Sequences.join(rows))
    return [Best(texts[b], float(reward_B[b])) for b in best_rows(reward_B, n)]


def best_rows(reward_B: np.ndarray, n: int) -> np.ndarray:
    """The row with the highest reward of each n rows that follow each other, [B / n].

    With `respond` and `score`, and each prompt n times, these are best-of-n.
    """
    return reward_B.reshape(-1, n).argmax(axis=1) + np.arange(0, len(reward_B), n)
