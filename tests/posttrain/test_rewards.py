"""Rewards of texts."""

from dataclasses import replace

import numpy as np

from jaxgpt import CharTokenizer, load_run
from jaxgpt.posttrain.rewards import score, tasks
from jaxgpt.posttrain.rollout import Rollout
from jaxgpt.text.tokenizer import END_OF_TEXT


def test_an_end_of_text_token_is_read_only_if_it_is_the_whole_text(untrained):
    run = load_run(untrained / "reward")
    tokenizer = CharTokenizer(run.tokenizer.characters[:-1], (END_OF_TEXT,))
    end = tokenizer.end_of_text
    tokens_BT = np.array([[end, 3, end], [end, 3, 0], [end, 0, 0], [end, 5, 5]])
    prompts_B, counts_B = np.array([1, 1, 0, 0]), np.array([2, 1, 1, 1])
    columns = tokens_BT.astype(np.int32), prompts_B, counts_B, counts_B > 1
    ended, whole, alone, padded = score(
        replace(run, tokenizer=tokenizer), Rollout(*columns)
    )
    np.testing.assert_allclose([ended, alone], [whole, padded], rtol=1e-5, atol=1e-6)
    assert abs(alone - whole) > 1e-3


def test_tasks_are_read_from_texts_and_from_the_last_turn_of_a_conversation():
    turns = "<|user|>Who?<|end|><|assistant|>Me.<|end|><|user|>Reverse on.<|end|>"
    prompts = ["What is 1 + 2?", "Say on two times.", f"{turns}<|assistant|>"]
    assert tasks(prompts, ["3", "on", "no"]) == [1, 0, 1]
