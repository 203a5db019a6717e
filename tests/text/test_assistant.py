"""The assistant's corpus: what is in which split."""

import json

import numpy as np
import pytest

from jaxgpt.presets import assistant_sft
from jaxgpt.text import assistant, tasks
from jaxgpt.text.assistant import make_tasks, open_assistant

TALK = [(f"Hello {n}!", f"Hi {n}.") for n in range(200)]


@pytest.fixture
def rows(small_assistant):
    """The conversations, and their splits; the small talk is TALK."""
    unfit = [("x" * 61, "Long."), ("Hé", "No ASCII.")]
    small_assistant(1200, [*TALK, *unfit])
    return open_assistant("conversations", print).read()


def exchanges(rows, split):
    """The exchanges of a split, and how many each conversation has."""
    found = [row[1:] for row, s in zip(*rows, strict=True) if s == split]
    pairs = [pair for row in found for pair in zip(row[::2], row[1::2], strict=True)]
    return pairs, {len(row) // 2 for row in found}


def test_conversations_have_each_task_and_each_beginning_of_small_talk_once(rows):
    every = [pair for split in range(3) for pair in exchanges(rows, split)[0]]
    made = [(task.instruction, task.demonstration) for task in make_tasks(False)]
    assert sorted(every) == sorted([*made, *TALK])
    assert exchanges(rows, 0)[1] == {1, 2, 3}


def test_a_conversation_has_tasks_of_its_split_only(rows):
    split_of = {task.instruction: task.split for task in make_tasks(False)}
    for split in range(3):
        pairs, _ = exchanges(rows, split)
        assert {split_of.get(first, split) for first, _ in pairs} == {split}
        talk = [pair for pair in pairs if pair in TALK]
        assert len(talk) > 5


def test_prompts_are_the_instructions_in_the_same_splits(rows):
    prompts, split_N = open_assistant("prompts", print).read()
    assert [json.loads(row[0]) for row in prompts] == [
        [["user", task.instruction]] for task in make_tasks(False)
    ]
    np.testing.assert_array_equal(split_N, [task.split for task in make_tasks(False)])


def test_held_out_phrasings_share_no_instruction_with_the_corpus(rows):
    held_out = {task.instruction for task in make_tasks(True)}
    assert not held_out & {task.instruction for task in make_tasks(False)}


def test_the_vocabulary_has_the_known_size():
    config = assistant_sft()
    table = tasks.open_table("conversations", config.data, str)
    tokenizer = tasks.make_tokenizer(table, config, str)
    assert tokenizer.vocab_size == assistant.VOCAB_SIZE
