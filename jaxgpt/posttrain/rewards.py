"""Rewards of responses: by a reward model, or by a function in code.

B responses
"""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxgpt.config import RewardedConfig
from jaxgpt.parallel.feeding import shard_batch
from jaxgpt.parallel.mesh import batch_sharding
from jaxgpt.parallel.processes import several_processes
from jaxgpt.posttrain.rollout import Program, Rollout, in_batches, special_ids
from jaxgpt.run import Run, load_run, text_tokenizer
from jaxgpt.text.conversations import END_OF_TURN
from jaxgpt.text.examples import Sequences
from jaxgpt.text.instructions import is_right
from jaxgpt.text.tokenizer import Tokenizer

# Maps a rollout to the reward of each response, f32 [B], before it is scaled.
Reward = Callable[[Rollout], Array]
# Maps prompts and responses to the reward of each response.
RewardFunction = Callable[[list[str], list[str]], list[float]]


def distinct_words(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of a response's words that differ from those before them."""
    words = [response.lower().split() for response in responses]
    return [len(set(each)) / max(len(each), 1) for each in words]


def tasks(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for the right answer to a task of `instructions`, else 0."""
    return [
        float(is_right(_instruction(prompt), response))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _instruction(prompt: str) -> str:
    """The text of a prompt, or of its last user's turn."""
    return prompt.rpartition("<|user|>")[-1].partition(END_OF_TURN)[0]


REWARDS: dict[str, RewardFunction] = {"distinct-words": distinct_words, "tasks": tasks}


def find_reward(name: str) -> RewardFunction:
    """The function that REWARDS, or MODULE:FUNCTION, names; ValueError without one."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, attribute = name.partition(":")
    try:
        function: RewardFunction = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"there is no reward {name!r} ({error}); give one of "
            f"{', '.join(REWARDS)}, or MODULE:FUNCTION of your own"
        ) from error
    return function


def make_reward(config: RewardedConfig, tokenizer: Tokenizer, mesh: Mesh) -> Reward:
    """Makes the reward of a config; a reward model is sharded over the mesh.

    A function runs on the host, in each process on all responses. Raises ValueError if
    it does not give each of them a finite number.
    """
    if config.reward_model:
        checkpoint = Path(config.reward_model)
        run = load_run(checkpoint.parent.parent, checkpoint.name, mesh)
        scores = partial(_scores, run.model, tokenizer.end_of_text)
        return Program(scores, mesh, batch_sharding(mesh), (run.params,))
    function = find_reward(config.reward)

    def reward(rolled: Rollout) -> Array:
        texts = decode_responses(jax.tree.map(on_host, rolled), tokenizer)
        found = function(*texts)
        values = np.array(found, np.float32)
        if values.shape != (len(texts[0]),) or not np.isfinite(values).all():
            raise ValueError(
                f"--reward {config.reward} must give each of {len(texts[0])} responses "
                f"a finite number, not {found!r:.100}"
            )
        rewards_B: Array = shard_batch(mesh, values)
        return rewards_B

    return reward


def _scores(
    model: nn.Module, end_of_text: int | None, params: Any, rolled: Rollout
) -> Array:
    """The score at the last token of each text, f32 [B].

    An end-of-text token is not part of the text, as in preferences, unless it is all.
    """
    lengths_B = rolled.lengths()
    if end_of_text is not None:
        last_B1 = jnp.take_along_axis(rolled.tokens_BT, lengths_B[:, None] - 1, axis=1)
        lengths_B = jnp.maximum(lengths_B - (last_B1[:, 0] == end_of_text), 1)
    rewards_B: Array = model.apply({"params": params}, rolled.tokens_BT, lengths_B)
    return rewards_B


def score(run: Run, rolled: Rollout) -> np.ndarray:
    """The reward model's score of each response, f32 [B], on the host."""
    end = text_tokenizer(run).end_of_text
    reward_B: np.ndarray = in_batches(partial(_scores, run.model, end), run, rolled)
    return reward_B


def score_texts(run: Run, texts: Sequences) -> np.ndarray:
    """The reward model's score of each text, f32 [B], on the host."""
    lengths_B = texts.lengths.astype(np.int32)
    tokens_BT = texts.padded(np.arange(len(texts)), int(lengths_B.max()))
    columns: Any = tokens_BT, lengths_B, 0 * lengths_B, lengths_B < 0
    return score(run, Rollout(*columns))


def check_same_tokenizer(judge: Tokenizer | None, policy: Tokenizer | None) -> None:
    """Raises ValueError unless a reward model reads the tokens of a policy."""
    if not (judge and policy) or judge.to_json() != policy.to_json():
        raise ValueError(
            "the reward model has another tokenizer than the run, so it can't read the "
            "run's tokens; give one that was trained from this run with --init-from"
        )


def decode_responses(
    rolled: Rollout, tokenizer: Tokenizer
) -> tuple[list[str], list[str]]:
    """The texts of prompts and of responses, given arrays on the host.

    Prompts lack the end-of-text token, and responses all special tokens.
    """
    special = special_ids(tokenizer)
    prompts, responses = list[str](), list[str]()
    rows = zip(rolled.tokens_BT, rolled.prompts_B, rolled.lengths(), strict=True)
    for tokens, start, stop in rows:
        prompt, response = tokens[:start], tokens[start:stop]
        prompts.append(tokenizer.decode(prompt[prompt != tokenizer.end_of_text]))
        responses.append(tokenizer.decode(response[~np.isin(response, special)]))
    return prompts, responses


def on_host(array: Array) -> np.ndarray:
    """The whole of a sharded array, in every process."""
    if several_processes():
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
