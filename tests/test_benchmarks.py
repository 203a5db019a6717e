import json

import jax
import numpy as np
import pytest
import torch
import torch_nanogpt
from conftest import finish, start_script

from benchmarks.generate import judge as judge_generation
from benchmarks.rounds import compete, rates, wanted
from benchmarks.torch_recipe import exact_loss, make_schedule
from benchmarks.train import best_of
from benchmarks.wall_clock import judge as judge_wall_clock
from benchmarks.wall_clock import wait_for
from jaxgpt import OptimizerConfig
from jaxgpt.interop.nanogpt import read_nanogpt
from jaxgpt.interop.state_dict import to_state_dict
from jaxgpt.models import build_model
from jaxgpt.ops import cross_entropy
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.training.evaluation import compile_losses, evaluate_exactly
from jaxgpt.training.optimizer import learning_rate_schedule

FAKE = """
import time

def build(name, log, seconds=0, fails_at=None):
    if fails_at == 0:
        raise ValueError(f"{name} can't begin")
    print("chatter that is no answer")
    turns = []

    def run():
        turns.append(name)
        if len(turns) == fails_at:
            raise ValueError(f"{name} can't go on")
        with open(log, "a") as file:
            file.write(name)
        time.sleep(seconds)
        return {"turn": len(turns)}

    return {"tokens": 6}, run
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Has fake contenders compete; returns what is found, and whose turns it was."""
    (tmp_path / "fake_contender.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"

    def run(rounds, **tasks):
        for name, task in tasks.items():
            task |= {"name": name, "log": str(log)}
        return compete("fake_contender", tasks, rounds), log.read_text()

    return run


@pytest.mark.parametrize("bias", [True, False])
def test_the_plain_pytorch_gpt_has_our_loss_and_gradients(tmp_path, bias):
    path = tmp_path / "ckpt.pt"
    theirs, _ = torch_nanogpt.make(path, bias=bias)
    for parameter in theirs.parameters():
        if parameter.dim() >= 2:  # small ones make the two kinds of GELU one
            parameter.data *= 8
    torch.save(torch.load(path) | {"model": theirs.state_dict()}, path)
    config, state, _ = read_nanogpt(path, log=pytest.fail)
    ((inputs, targets),) = torch_nanogpt.batches([9])
    model = build_model(config.model, "cpu")

    def our_loss(params):
        return cross_entropy(model.apply({"params": params}, inputs), targets).mean()

    our, gradients = jax.value_and_grad(our_loss)(state.params)
    loss = torch.nn.functional.cross_entropy(
        theirs(torch.tensor(inputs)).flatten(0, 1),
        torch.tensor(targets, dtype=torch.int64).flatten(),
    )
    theirs.zero_grad()
    loss.backward()
    assert float(our) == pytest.approx(loss.item(), abs=1e-6)
    ours = to_state_dict(gradients, config.model, out_in=True)
    for name, parameter in theirs.named_parameters():
        name = name.replace("lm_head", "transformer.wte") if "lm" in name else name
        assert parameter.grad.abs().max() > 1e-5
        np.testing.assert_allclose(
            ours[name], parameter.grad.numpy(), atol=2e-6, err_msg=name
        )


def test_contenders_take_turns_and_every_other_round_goes_backwards(fake):
    found, turns = fake(3, a={}, b={}, c={})
    assert turns == "abccbaabc"
    assert [turn["turn"] for turn in found["b"]["rounds"]] == [1, 2, 3]
    assert found["b"]["tokens"] == 6
    assert found["b"]["peak_mib"] > 1


def test_a_round_lasts_as_long_as_its_contender_works(fake):
    found, _ = fake(1, quick={}, slow={"seconds": 0.5})
    seconds = {name: facts["rounds"][0]["seconds"] for name, facts in found.items()}
    assert seconds["quick"] < 0.5 <= seconds["slow"] < 5


def test_one_that_fails_is_told_of_and_the_others_go_on(fake):
    found, turns = fake(3, a={}, b={"fails_at": 0}, c={"fails_at": 2}, d={})
    assert turns == "acddaad"
    assert found["b"] == {"failed": "ValueError: b can't begin"}
    assert found["c"] == {"failed": "ValueError: c can't go on"}
    assert len(found["a"]["rounds"]) == len(found["d"]["rounds"]) == 3


def test_rates_are_of_the_rounds_one_by_one():
    facts = {"tokens": 12, "rounds": [{"seconds": s} for s in (1, 4, 2)]}
    assert rates(facts, "tokens") == {"median": 6, "lowest": 3, "highest": 12}


def test_the_best_of_each_side_at_a_precision_are_compared():
    speeds = {
        "jaxgpt float32": 30.0,
        "jaxgpt bfloat16": 10.0,
        "torch eager float32": 15.0,
        "torch eager bfloat16": 60.0,
    }
    assert best_of(speeds, "float32") == {
        "ours": "jaxgpt float32",
        "theirs": "torch eager float32",
        "ratio": 2.0,
    }
    assert best_of(speeds, "")["ratio"] == 0.5
    assert best_of({"jaxgpt float32": 30.0}, "float32") is None


def test_one_that_is_left_out_of_generation_has_no_ratio():
    turn = {"seconds": 2.0, "first_seconds": 0.5}
    judged = judge_generation(
        {
            "jaxgpt": {"tokens": 8, "rounds": [turn]},
            "transformers": {"tokens": 2, "rounds": [{"seconds": 2.0}]},
            "torch lecture": {"left_out": "too long"},
        }
    )
    assert judged["transformers"]["ratio"] == 4
    assert judged["jaxgpt"]["first_seconds"] == 0.5
    assert judged["torch lecture"] == {"left_out": "too long"}


def test_names_are_chosen_by_their_parts():
    names = ("jaxgpt float32", "torch eager float32", "torch eager bfloat16")
    assert wanted(names, ()) == list(names)
    assert wanted(names, ("jaxgpt", "bfloat16")) == [names[0], names[2]]


def test_the_ratios_of_a_report_are_the_quotients_of_its_medians(tmp_path):
    out = tmp_path / "train.json"
    arguments = ["--rounds", "3", "--seconds", "0.05", "--out", out, "--shapes", "tiny"]
    names = ["jaxgpt float32", "torch eager float32"]
    process = start_script(
        *("-m", "benchmarks.train", *arguments, "--contenders", *names)
    )
    shown, _ = finish(process)
    report = json.loads(out.read_text())
    found = report["shapes"]["tiny"]
    assert list(found["contenders"]) == names
    ceiling = max(facts["gflops"] for facts in report["ceilings"].values())
    ours = found["contenders"][names[0]]["tokens_per_second"]["median"]
    for facts in found["contenders"].values():
        speed = facts["tokens_per_second"]["median"]
        each = sorted(facts["tokens"] / turn["seconds"] for turn in facts["rounds"])
        assert speed == each[1]
        assert facts["ratio"] == pytest.approx(ours / speed)
        gflops = speed * found["flops_per_update"] / (16 * 32) / 1e9
        assert facts["share_of_ceiling"] == pytest.approx(gflops / ceiling)
        assert f"{speed:,.0f}" in shown
        assert all(0 < turn["loss"] < 5 for turn in facts["rounds"])
    assert found["best_float32"]["ratio"] == pytest.approx(
        ours / found["contenders"][names[1]]["tokens_per_second"]["median"]
    )


def test_pytorchs_recipe_has_our_learning_rates():
    config = OptimizerConfig(warmup_steps=3)
    ours = learning_rate_schedule(config, max_steps=20)
    adamw = torch.optim.AdamW([torch.zeros(1)], lr=config.learning_rate)
    schedule = make_schedule(adamw, 20, vars(config))
    for step in range(20):
        assert schedule.get_last_lr()[0] == pytest.approx(float(ours(step)), rel=1e-5)
        adamw.step()
        schedule.step()


@pytest.mark.parametrize("length", [2, 8, 9, 20, 8 * 65 + 3])
def test_pytorchs_exact_loss_is_ours(tmp_path, length):
    path = tmp_path / "ckpt.pt"
    theirs, _ = torch_nanogpt.make(path)
    config, state, _ = read_nanogpt(path, log=pytest.fail)
    T = config.model.block_size
    tokens = np.random.default_rng(0).integers(11, size=length).astype(np.int32)
    model = build_model(config.model, "cpu")
    losses = compile_losses(model, make_mesh(config))
    ours = evaluate_exactly(losses, state.params, tokens, config)
    found = exact_loss(theirs, torch.tensor(tokens, dtype=torch.int64), T)
    assert found == pytest.approx(ours.nats_per_token, rel=1e-5)


def test_seconds_are_those_until_the_line_is_printed():
    late = "import time; time.sleep(0.5); print('step 1/', flush=True); time.sleep(1)"
    seconds, line = wait_for("step 1/", ["-c", late], {})
    assert 0.5 < seconds < 1.4
    assert line == "step 1/\n"
    with pytest.raises(RuntimeError, match="chatter"):
        wait_for("step 1/", ["-c", "print('chatter')"], {})


def test_the_wall_clock_compares_with_the_faster_of_pytorchs():
    seconds = {"first start": 8.0, "second start": 2.0, "jaxgpt fast": 20.0}
    seconds |= {"jaxgpt": 50.0, "torch eager": 100.0, "torch compile": 80.0}
    assert list(judge_wall_clock(seconds).values()) == [0.25, 0.25, 0.625]
