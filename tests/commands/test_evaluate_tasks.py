"""The report on an assistant's tasks."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import TINY, changed

import train
from jaxgpt import load_run
from jaxgpt.commands import evaluate_tasks
from jaxgpt.commands.evaluate_tasks import pass_rates, right_answers
from jaxgpt.config import GRPOConfig
from jaxgpt.run import find_checkpoint, load_config
from jaxgpt.text import assistant
from jaxgpt.text.instructions import FAMILIES, make_task, solve

# Two of each family.
TASKS = [make_task(3, n) for n in (*range(12), *range(16, 28))]


@pytest.fixture
def run_dir(small_assistant, tmp_path):
    """A run that has made a step on the assistant's corpus, of 240 tasks."""
    small_assistant(240, [(f"Hi {n}!", "Hello!") for n in range(60)])
    config = changed(
        TINY,
        model={"n_layer": 1, "block_size": 128, "vocab_size": None},
        data={"corpus": "assistant", "packing": "conversations", "learn_prompts": True},
        train={"max_steps": 1, "eval_interval": 1},
        mesh={"data": 1},
    )
    train.train(config, tmp_path / "sft", resume=False, overwrite=False)
    return tmp_path / "sft"


def test_pass_rates_are_of_the_greedy_response_and_of_any_sample():
    right_NK = np.zeros((24, 9), bool)
    right_NK[:6, 0] = right_NK[2:10, 3] = right_NK[5:9, 8] = True
    report = pass_rates(TASKS, right_NK)
    assert [report[name] for name in ("count", "pass_at_1", "pass_at_8")] == [
        24,
        0.25,
        8 / 24,
    ]
    assert report["standard_error"] == (0.25 * 0.75 / 24) ** 0.5
    assert [*report["families"]] == [*FAMILIES]
    sums = report["families"]["sum"]
    assert (sums["count"], sums["pass_at_1"], sums["pass_at_8"]) == (2, 0.5, 0)


def test_each_response_is_held_against_its_own_instruction(run_dir, monkeypatch):
    run, seen = load_run(run_dir), []

    def respond(run, rows, temperature):
        texts = [run.tokenizer.decode(row) for row in rows]
        seen.append(temperature)
        found = [text[len("<|endoftext|><|user|>") :] for text in texts]
        answers = [
            solve(text.removesuffix("<|end|><|assistant|>"))[1] for text in found
        ]
        if temperature == 0:
            return ["", *answers[1:]]
        return [answers[0], *["?"] * (len(rows) - 1)]

    monkeypatch.setattr(evaluate_tasks, "_responses", respond)
    right_NK = right_answers(run, TASKS)
    expected = np.zeros((24, 9), bool)
    expected[1:, 0] = expected[0, 1] = True
    np.testing.assert_array_equal(right_NK, expected)
    assert seen == [0.0, 1.0]


def test_evaluate_reports_the_tasks_of_the_runs_that_learn_them(
    run_dir, call, monkeypatch
):
    make_tasks = assistant.make_tasks  # each instruction counts once
    monkeypatch.setattr(evaluate_tasks, "make_tasks", lambda of: make_tasks(of) * 2)
    flags = "evaluate", "--split", "test"
    captured = call("jaxgpt", *flags, "--run-dir", run_dir, "--json")
    report = json.loads(captured.out)
    assert report["answers"] > 0
    for part, shown in report["tasks"].items():
        every = assistant.make_tasks(part == "phrasings")
        of_split = [task for task in every if task.split == 2]
        texts = {task.instruction.rstrip(".?").casefold() for task in of_split}
        assert shown["count"] == len(texts) > 10
    path = run_dir.parent / "other.txt"
    path.write_text("How warm is it in Rome? " * 20)
    other = "--data-path", path, "--packing", "windows", "--json"
    assert json.loads(call("jaxgpt", *flags[:1], "--run-dir", run_dir, *other).out)
    tuned = run_dir.parent / "grpo"
    tokenizer = str(run_dir / "tokenizer.json")
    config = changed(
        load_config(run_dir),
        data={"packing": "windows", "learn_prompts": False, "batch_size": 16}
        | {"sha256": "", "tokenizer": tokenizer},
        train={"init_from": str(find_checkpoint(run_dir, "best"))},
    )
    settings = GRPOConfig(reward="tasks", max_new_tokens=4)
    config = dataclasses.replace(config, grpo=settings)
    train.train(config, tuned, resume=False, overwrite=False)
    out = call("jaxgpt", *flags, "--run-dir", tuned).out
    assert "response tokens" in out
    assert out.splitlines()[-1].split()[0] == "all"
