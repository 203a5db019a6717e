import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_nanogpt
from conftest import finish, start_script

from benchmarks import generate, rounds, wall_clock
from benchmarks.rounds import compete, wanted
from benchmarks.torch_recipe import exact_loss, make_schedule
from benchmarks.train import judge as judge_training
from benchmarks.train import shape_config
from jaxgpt import OptimizerConfig
from jaxgpt.interop.nanogpt import read_nanogpt
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning.flops import step_flops
from jaxgpt.training.evaluation import evaluate_exactly, make_losses_step
from jaxgpt.training.optimizer import learning_rate_schedule

# A contender whose rounds take made-up seconds.
FAKE = """
import signal, time

def build(name, log, seconds=0, fails_at=None):
    if fails_at == 0:
        raise ValueError(f"{name} can't begin")
    if fails_at == -1:
        signal.raise_signal(signal.SIGKILL)
    print("chatter that is no answer")
    now, turns = [0], []
    time.perf_counter = lambda: now[0]

    def run():
        turns.append(name)
        if len(turns) == fails_at:
            raise ValueError(f"{name} can't go on")
        with open(log, "a") as file:
            file.write(name)
        now[0] += seconds
        return {"turn": len(turns)}

    return {"tokens": 6}, run
"""

WAITS_UNTIL_SEEN = """
import pathlib, sys, time

print("step 1/", flush=True)
deadline = time.monotonic() + 60
while not pathlib.Path(sys.argv[1]).exists():
    assert time.monotonic() < deadline
    time.sleep(0.01)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Has fake contenders compete; returns what is found, and whose turns it was."""
    (tmp_path / "fake_contender.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rounds, "_PAUSE", 0)

    def run(count, **tasks):
        log = tmp_path / "log"
        tasks = {k: {"name": k, "log": str(log), **task} for k, task in tasks.items()}
        return compete("fake_contender", tasks, count), log.read_text()

    return run


def test_contenders_take_turns_and_every_other_round_goes_backwards(fake):
    found, turns = fake(3, a={}, b={"seconds": 5}, c={})
    assert turns == "abccbaabc"
    assert all(facts.pop("peak_mib") > 1 for facts in found.values())
    for name, seconds in (("a", 0), ("b", 5), ("c", 0)):
        turns = [{"seconds": seconds, "turn": turn} for turn in (1, 2, 3)]
        assert found[name] == {"tokens": 6, "rounds": turns}


def test_a_contenders_failure_is_reported_and_the_others_go_on(fake):
    found, turns = fake(3, a={}, b={"fails_at": 0}, c={"fails_at": 2}, d={})
    assert turns == "acddaad"
    assert found["b"] == {"failed": "ValueError: b can't begin"}
    assert found["c"] == {"failed": "ValueError: c can't go on"}
    assert len(found["a"]["rounds"]) == len(found["d"]["rounds"]) == 3


def test_a_contender_without_enough_memory_is_told_so(fake, monkeypatch):
    found, _ = fake(1, a={}, b={"fails_at": -1})
    assert "memory" in found["b"]["failed"]
    nothing_left = SimpleNamespace(available=1)
    monkeypatch.setattr(rounds.psutil, "virtual_memory", lambda: nothing_left)
    found, turns = fake(1, c={}, d={})
    assert turns == "ac"
    assert "memory" in found["d"]["left_out"]


def rounds_of(tokens, *seconds):
    return {"tokens": tokens, "rounds": [{"seconds": s} for s in seconds]}


def test_training_is_judged_by_median_speeds_and_the_highest_ceiling():
    config = shape_config("tiny")
    results = {
        "jaxgpt float32": rounds_of(600, 1, 3, 2),
        "torch eager float32": rounds_of(600, 4, 6, 5),
        "torch compile float32": {"failed": "no compiler"},
        "transformers eager float32": {"left_out": "out of memory"},
        "torch eager bfloat16": rounds_of(600, 1, 1, 1),
    }
    gflops = {"jax float32": 2.0, "torch float32": 5.0, "torch bfloat16": 9.0}
    ceilings = {f"ceiling {name}": {"gflops": n} for name, n in gflops.items()}
    report = judge_training(config, results, ceilings)
    assert report["contenders"].pop("transformers eager float32") == {
        "left_out": "out of memory"
    }
    ours, theirs, failed, half = report["contenders"].values()
    assert failed == {"failed": "no compiler"}
    speeds = {"median": 300, "lowest": 200, "highest": 600}
    assert ours["tokens_per_second"] == speeds
    expected = 300 / (16 * 32) * step_flops(config) / 1e9
    assert ours["share_of_ceiling"] == pytest.approx(expected / 5.0)
    assert [facts["ratio"] for facts in (ours, theirs, half)] == [1.0, 2.5, 0.5]
    best = {"ours": "jaxgpt float32", "theirs": "torch eager float32", "ratio": 2.5}
    assert report["best_float32"] == best
    assert report["best"] == best | {"theirs": "torch eager bfloat16", "ratio": 0.5}


@pytest.mark.processes
def test_the_training_benchmark_runs_and_writes_its_report(tmp_path):
    out, names = tmp_path / "train.json", ["jaxgpt float32", "torch eager float32"]
    flags = ["--rounds", 3, "--seconds", 0.05, "--out", out, "--shapes", "tiny"]
    command = ["-m", "benchmarks.train", *flags, "--contenders", *names]
    shown, _ = finish(start_script(*command))
    report = json.loads(out.read_text())
    found = report["shapes"]["tiny"]["contenders"]
    assert list(found) == names
    for facts in found.values():
        speed = facts["tokens_per_second"]["median"]
        each = sorted(facts["tokens"] / turn["seconds"] for turn in facts["rounds"])
        assert speed == each[1]
        assert f"{speed:,.0f}" in shown
        assert all(0 < turn["loss"] < 5 for turn in facts["rounds"])
    expected = judge_training(shape_config("tiny"), found, report["ceilings"])
    assert json.loads(json.dumps(expected)) == report["shapes"]["tiny"]


def test_a_contender_that_is_left_out_of_generation_has_no_ratio():
    judged = generate.judge(
        {
            "jaxgpt": {"tokens": 8, "rounds": [{"seconds": 2.0, "first_seconds": 0.5}]},
            "transformers": rounds_of(2, 2.0),
            "torch lecture": {"left_out": "too long"},
        }
    )
    assert judged["transformers"]["ratio"] == 4
    assert judged["jaxgpt"]["first_seconds"] == 0.5
    assert judged["torch lecture"] == {"left_out": "too long"}


def test_what_transformers_cannot_do_is_left_out(monkeypatch, capsys, tmp_path):
    tried = []

    def compete(module, tasks, count):
        tried.extend(tasks)
        return {}

    monkeypatch.setattr(generate, "compete", compete)
    monkeypatch.setattr(generate, "settle", lambda device: None)
    arguments = ["--contenders", "transformers", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["benchmarks.generate", *arguments])
    assert generate.main() == 0
    out = capsys.readouterr().out
    assert out.count("left out: not supported beyond the window") == 3
    window = json.loads((tmp_path / "out.json").read_text())["model"]["block_size"]
    cases = generate.CASES.values()
    assert len(tried) == sum(case.prompt + case.new <= window for case in cases) == 3


def test_contenders_are_chosen_by_parts_of_their_names():
    names = ["jaxgpt float32", "torch eager float32", "torch eager bfloat16"]
    assert wanted(names, ()) == names
    assert wanted(names, ("jaxgpt", "bfloat16")) == [names[0], names[2]]
    with pytest.raises(SystemExit, match="bfloat61"):
        wanted(names, ("jaxgpt", "bfloat61"))


def test_pytorchs_recipe_has_our_learning_rates():
    config = OptimizerConfig(warmup_steps=3)
    ours = learning_rate_schedule(config, max_steps=20)
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=config.learning_rate)
    schedule = make_schedule(adamw, 20, vars(config))
    for step in range(20):
        assert schedule.get_last_lr()[0] == pytest.approx(float(ours(step)), rel=1e-5)
        adamw.step()
        schedule.step()


def test_pytorchs_exact_loss_is_ours(tmp_path):
    path = tmp_path / "ckpt.pt"
    theirs, _ = torch_nanogpt.make(path)
    config, state, _ = read_nanogpt(path, log=pytest.fail)
    T = config.model.block_size
    mesh = make_mesh(config)
    losses = make_losses_step(build_model(config.model, "cpu"), mesh)
    for length in (2, T, T + 1, 20, 65 * T + 3):
        tokens = np.random.default_rng(0).integers(11, size=length).astype(np.int32)
        ours = evaluate_exactly(losses, state.params, tokens, config, mesh)
        found = exact_loss(theirs, torch.tensor(tokens, dtype=torch.int64), T)
        assert found == pytest.approx(ours.nats_per_token, rel=1e-5)


def test_seconds_are_read_when_the_line_is_printed(tmp_path, monkeypatch):
    readings, seen = [], tmp_path / "seen"

    def clock():  # a second later at each reading; the second lets the script end
        readings.append(float(len(readings)))
        if len(readings) == 2:
            seen.touch()
        return readings[-1]

    monkeypatch.setattr(wall_clock, "time", SimpleNamespace(perf_counter=clock))
    (tmp_path / "script.py").write_text(WAITS_UNTIL_SEEN)
    command = [str(tmp_path / "script.py"), str(seen)]
    assert wall_clock.wait_for("step 1/", command, {}) == (1.0, "step 1/\n")
    with pytest.raises(RuntimeError, match="chatter"):
        wall_clock.wait_for("step 1/", ["-c", "print('chatter')"], {})


def test_the_wall_clock_compares_with_the_faster_of_pytorchs():
    seconds = {"first start": 8.0, "second start": 2.0, "jaxgpt fast": 20.0}
    seconds |= {"jaxgpt": 50.0, "torch eager": 100.0, "torch compile": 80.0}
    assert list(wall_clock.judge(seconds).values()) == [0.25, 0.25, 0.625]
