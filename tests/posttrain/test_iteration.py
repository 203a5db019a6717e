"""Runs of PPO and GRPO: what they learn, and what they refuse."""

import itertools
import json
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed

import train
from jaxgpt import CharTokenizer, exits, load_run
from jaxgpt.cli import parse_arguments
from jaxgpt.config import GRPOConfig, PPOConfig, RewardConfig, RewardedConfig
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import AXES, single_device_mesh
from jaxgpt.posttrain import iteration, rewards
from jaxgpt.posttrain.ppo import PPOBatch
from jaxgpt.run import find_checkpoint, load_config, load_state, save_config
from jaxgpt.training.checkpoint import open_checkpoints, save_state
from jaxgpt.training.monitor import read_rows
from jaxgpt.training.step import create_state

PHASES = ("rollout_seconds", "judge_seconds", "update_seconds")


def count_t(prompts, responses):
    """A reward: how often a response has the letter t."""
    return [float(response.count("t")) for response in responses]


@pytest.fixture(scope="module")
def prompts(make_once):
    def make(folder):
        words = itertools.product("Tobern t,", repeat=3)
        lines = [json.dumps({"prompt": "".join(word)}) for word in words]
        (folder / "prompts.jsonl").write_text("\n".join(lines))

    return make_once("prompts", make) / "prompts.jsonl"


@pytest.fixture(scope="module")
def reward_run(tiny_run, make_once):
    """A reward model with random parameters."""

    def make(folder):
        base = load_config(tiny_run)
        values = {n: v for n, v in vars(base.model).items() if n != "architecture"}
        config = replace(base, model=RewardConfig(**values))
        model = build_model(config.model, "cpu")
        state = create_state(model, config, single_device_mesh())
        with open_checkpoints(folder / "run/checkpoints") as checkpoints:
            save_state(checkpoints, replace(state, step=jnp.array(3)), 0.5)
        save_config(folder / "run", config, load_run(tiny_run).tokenizer)

    return make_once("reward-run", make) / "run"


@pytest.fixture
def config(tiny_run, prompts, monkeypatch):
    """Four iterations from `tiny_run` with four minibatches of 8 responses."""
    monkeypatch.setitem(rewards.REWARDS, "count-t", count_t)
    settings = PPOConfig(
        reward="count-t", max_new_tokens=4, end="sentence", epochs=2, minibatches=4
    )
    base = changed(
        load_config(tiny_run),
        data={
            "path": (str(prompts),),
            "tokenizer": str(tiny_run / "tokenizer.json"),
            "batch_size": 32,
            "sha256": "",
        },
        optimizer={"learning_rate": 3e-3, "warmup_steps": 0, "weight_decay": 0.0},
        train={
            "max_steps": 4,
            "eval_interval": 2,
            "checkpoint_interval": 1,
            "eval_iters": 1,
            "init_from": str(find_checkpoint(tiny_run, "best")),
        },
        mesh={"data": 1},
    )
    return replace(base, ppo=settings)


def by_grpo(config):
    """The same by GRPO, in groups of 4."""
    shared = {field.name for field in fields(RewardedConfig)}
    settings = {name: getattr(config.ppo, name) for name in shared}
    return replace(config, ppo=None, grpo=GRPOConfig(**settings, group_size=4))


def rows_of(run_dir, event):
    return [r for r in read_rows(run_dir / "metrics.jsonl") if r["event"] == event]


def run(config, run_dir, **options):
    options = {"resume": False, "overwrite": False} | options
    return train.train(config, run_dir, **options)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_training_raises_the_reward_and_reports_its_phases(
    config, tmp_path, call, method
):
    steps = {"max_steps": 24, "eval_interval": 12, "checkpoint_interval": 12}
    config = changed(config, train=steps)
    if method == "grpo":
        config = by_grpo(config)
    assert run(config, tmp_path / "run") == 0
    first, *_, last = rows_of(tmp_path / "run", "eval")
    # A response has at most 4 letters t, and without an end a penalty of 1.
    assert last["val_reward"] > first["val_reward"] + 1
    assert first["val_kl"] == pytest.approx(0, abs=1e-5)
    assert last["val_kl"] > 0.1
    for row in rows_of(tmp_path / "run", "train"):
        assert max(row["first_ratio_error"], row["first_kl"]) < 1e-4
        seconds = sum(row[name] for name in PHASES)
        tokens = 32 * row["response_tokens"]
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds, rel=0.5)
        assert 0 <= row["clip_fraction"] <= 1
        assert row["loss"] == pytest.approx(0.05 * row["kl"] - row["reward"], abs=1e-5)
    for name in ("loss.png", "reward.png"):
        assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")
    flags = "--run-dir", tmp_path / "run", "--checkpoint", "latest", "--json"
    report = json.loads(call("jaxgpt", "evaluate", *flags, "--batch-size", 32).out)
    done = rows_of(tmp_path / "run", "done")[0]
    assert report["loss"] == pytest.approx(done["val_loss"], abs=1e-5)
    assert call("generate.py", "--run-dir", tmp_path / "run").out
    call("jaxgpt", "export", "nanogpt", tmp_path / "run", tmp_path / "ckpt.pt")


def test_metrics_weigh_each_token_equally(config, tmp_path):
    """Without learning, the policy's loss is minus the mean of whitened advantages."""
    optimizer = {"learning_rate": 1e-12, "min_lr": 0.0}
    once = {"eval_interval": 4, "checkpoint_interval": 4}
    run(changed(config, optimizer=optimizer, train=once), tmp_path / "run")
    rows = rows_of(tmp_path / "run", "train")
    assert len(rows) == 4
    for row in rows:
        assert row["response_tokens"] < 4
        assert row["policy_loss"] == pytest.approx(0, abs=1e-6)


def outcome(run_dir):
    """The state, and the rows without times."""
    _, state, _ = load_state(run_dir, "latest")
    rows = [
        {name: row[name] for name in row if not name.endswith(("_second", "_seconds"))}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)], rows


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_stopped_run_resumes_bit_for_bit(
    config, reward_run, tmp_path, monkeypatch, call, method
):
    settings = replace(config.ppo, reward="", kl_target=1.0, kl_horizon=100)
    settings = replace(settings, reward_model=str(find_checkpoint(reward_run, "best")))
    config = replace(config, ppo=settings)
    if method == "grpo":
        config = by_grpo(config)
    run(config, tmp_path / "whole")
    saved = load_config(tmp_path / "whole").rewarded
    assert saved.reward_mean != 0
    assert saved.reward_std not in (0, 1)
    betas = [row["beta"] for row in rows_of(tmp_path / "whole", "train")]
    assert len(set(betas)) == (4 if method == "ppo" else 1)

    def read(source, steps, *others, read=train.read_batches):
        if steps.start == 2:
            signal.raise_signal(signal.SIGTERM)
        return read(source, steps, *others)

    with monkeypatch.context() as patch:
        patch.setattr(train, "read_batches", read)
        with exits.plain_errors():
            assert run(config, tmp_path / "run") == signal.SIGTERM
    assert len(rows_of(tmp_path / "run", "train")) == 3
    call("train.py", "--out-dir", tmp_path / "run", "--resume")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_the_command_line_takes_a_reward_model_that_reads_what_the_policy_writes(
    config, tiny_run, reward_run, prompts, tmp_path
):
    flags = ["ppo", "--init-from", tiny_run, "--data.path", prompts, "--reward-model"]

    def parse(reward_model):
        flags_ = *flags, reward_model, "--out-dir", tmp_path / "new"
        return parse_arguments([*map(str, flags_)])[0]

    best = str(find_checkpoint(reward_run, "best"))
    assert parse(reward_run).ppo.reward_model == best
    other = tmp_path / "other"
    shutil.copytree(reward_run, other)
    save_config(other, load_config(other), CharTokenizer("To ber,nt.\n"[::-1]))
    with pytest.raises(ValueError, match="another tokenizer"):
        parse(other)
    save_config(other, changed(load_config(other), model={"block_size": 4}), None)
    with pytest.raises(ValueError, match=r"block_size=8.*--model.block-size 4"):
        parse(other)
    save_config(tmp_path / "begun", config, None)
    resume = "--out-dir", str(tmp_path / "begun"), "--resume"
    assert parse_arguments([*resume])[0] == config
    trained = parse(reward_run)
    save_config(tmp_path / "new", trained, None)
    resume_new = "--out-dir", str(tmp_path / "new"), "--resume", "--reward-model"
    assert parse_arguments([*resume_new, str(reward_run)])[0] == trained
    with pytest.raises(ValueError, match=r"--reward other contradicts.*count-t"):
        parse_arguments([*resume, "--reward", "other"])


@pytest.mark.parametrize("name", ["reference", "reward"])
def test_a_run_refuses_another_reference_or_reward_model(
    config, reward_run, tmp_path, name
):
    checkpoint = str(find_checkpoint(reward_run, "best"))
    settings = replace(config.ppo, reward="", reward_model=checkpoint)
    digests = {"reference_sha256": iteration.digest(Path(config.train.init_from))}
    digests["reward_sha256"] = iteration.digest(Path(checkpoint))
    settings = replace(settings, **digests | {f"{name}_sha256": "0" * 64})
    with pytest.raises(ValueError, match=f"the {name}.* has changed since the run"):
        run(replace(config, ppo=settings), tmp_path / "run")


@pytest.mark.slow
def test_a_policy_that_is_not_the_one_that_sampled_stops_the_run(
    config, tmp_path, monkeypatch
):
    def altered(*columns):
        batch = PPOBatch(*columns)
        return batch._replace(log_probs_BN=batch.log_probs_BN + 1e-3)

    monkeypatch.setattr(iteration.ppo, "PPOBatch", altered)
    with pytest.raises(ArithmeticError, match=r"first_ratio_error is 1.0e-03"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "reward",
    [lambda p, r: [0.0], lambda p, r: [float("nan")] * len(r)],
)
def test_a_reward_must_be_a_finite_number_for_each_response(
    config, tmp_path, monkeypatch, reward
):
    monkeypatch.setitem(rewards.REWARDS, "count-t", reward)
    with pytest.raises(ValueError, match="--reward count-t"):
        run(config, tmp_path / "run")


@pytest.mark.devices
@pytest.mark.parametrize("axis", [*AXES, "microbatches", "groups"])
def test_every_mesh_learns_as_one_device(config, reward_run, tmp_path, axis):
    settings = replace(
        config.ppo, reward="", reward_model=str(find_checkpoint(reward_run, "best"))
    )
    config = changed(replace(config, ppo=settings), train={"max_steps": 2})
    names = ["reward", "kl", "policy_loss", "value_loss", "entropy"]
    sections = {"mesh": {"data": 1, axis: 2 if axis == "tensor" else 8}}
    if axis == "groups":
        config, sections = by_grpo(config), {"mesh": {"data": 8}}
        names[3] = "kl_loss"
    run(config, tmp_path / "one")
    if axis == "microbatches":
        sections = {"data": {"gradient_accumulation_steps": 4}}
    run(changed(config, **sections), tmp_path / "many")
    for row, other in zip(
        rows_of(tmp_path / "one", "train"),
        rows_of(tmp_path / "many", "train"),
        strict=True,
    ):
        for name in names:
            assert row[name] == pytest.approx(other[name], abs=2e-5), name
        assert row["response_tokens"] == other["response_tokens"]
