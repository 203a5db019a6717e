import re

import jax
import numpy as np
import pytest
from conftest import changed, save_params

from jaxgpt import CharTokenizer, SamplingConfig, load_run
from jaxgpt.generation.stream import generate
from jaxgpt.posttrain.best_of import best_of, best_rows
from jaxgpt.run import save_config
from jaxgpt.training.checkpoint import open_checkpoints

MORE = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(untrained):
    return load_run(untrained / "gpt"), load_run(untrained / "reward")


def rewards_of(judge, prompt, texts):
    """The rewards of prompt and text, each read alone."""
    T, found = judge.config.model.block_size, []
    apply = jax.jit(judge.model.apply)
    for text in texts:
        ids = judge.tokenizer.encode_prompt(prompt + text)[-T:]
        padded = np.pad(ids, (0, T - len(ids)))[None]
        found.append(apply({"params": judge.params}, padded, np.array([len(ids)]))[0])
    return np.array(found)


@pytest.mark.parametrize(
    "stop", [*(pytest.param(stop, marks=MORE) for stop in ("", "e")), "in"]
)
def test_the_best_are_the_samples_with_the_highest_reward(runs, stop):
    run, judge = runs
    options = {"max_new_tokens": 12, "seed": 5, "stop": stop}
    texts = generate(run, "Lear", num_samples=6, temperature=0.9, **options)
    rewards = rewards_of(judge, "Lear", texts).reshape(2, 3)
    found = best_of(
        *(run, judge, "Lear", 3),
        num_samples=2,
        sampling=SamplingConfig(temperature=0.9),
        **options,
    )
    expected = [texts[row * 3 + rewards[row].argmax()] for row in range(2)]
    assert [best.text for best in found] == expected
    np.testing.assert_allclose(
        [best.reward for best in found], rewards.max(axis=1), rtol=1e-4, atol=1e-5
    )
    assert np.ptp(rewards) > 0.1


@MORE
def test_a_reward_model_reads_the_last_tokens_of_a_long_text(runs):
    run, judge = runs
    prompt = "Lear tells a tale of winters.\n" * 2
    (best,) = best_of(run, judge, prompt, 2, max_new_tokens=20)
    expected = rewards_of(judge, prompt, [best.text])
    np.testing.assert_allclose(best.reward, expected[0], rtol=1e-4, atol=1e-5)


def test_generate_prints_the_best_and_its_reward_apart(call, untrained, runs):
    flags = ["--best-of", 3, "--reward-model", untrained / "reward"]
    flags += ["--run-dir", untrained / "gpt", "--prompt", "Lear", "--num-samples", 2]
    out, err = call("generate.py", *flags, "--max-new-tokens", 9)
    found = best_of(*runs, "Lear", 3, max_new_tokens=9, num_samples=2)
    separator = f"\n{'-' * 40}\n"
    assert out == separator.join(f"Lear{best.text}" for best in found) + "\n"
    rewards = [float(number) for number in re.findall(r"reward (-?[\d.]+)", err)]
    np.testing.assert_allclose(rewards, [best.reward for best in found], atol=1e-4)


@pytest.mark.parametrize("flags", [["--best-of", 2], ["--reward-model", "x"]])
def test_neither_flag_goes_alone(call, untrained, flags):
    with pytest.raises(ValueError, match=r"--best-of N and --reward-model"):
        call("generate.py", "--run-dir", untrained / "gpt", *flags)


def test_the_reward_model_must_be_one_and_have_the_same_tokenizer(runs, tmp_path):
    run, judge = runs
    with pytest.raises(ValueError, match="architecture=gpt"):
        best_of(run, run, "Lear", 2)
    with pytest.raises(ValueError, match="best_of=0"):
        best_of(run, judge, "Lear", 0)
    other = CharTokenizer(judge.tokenizer.characters[::-1], judge.tokenizer.special)
    config = changed(judge.config)
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        save_params(checkpoints, 1, judge.params)
    save_config(tmp_path, config, other)
    with pytest.raises(ValueError, match="another tokenizer"):
        best_of(run, load_run(tmp_path), "Lear", 2)


def test_the_best_row_of_each_prompt_is_the_first_of_the_highest():
    assert best_rows(np.array([1, 3, 2, 5, 5, 0.0]), 3).tolist() == [1, 3]
