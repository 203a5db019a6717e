import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch_nanogpt
from conftest import changed, finish, start_script
from jax.profiler import ProfileData

from benchmarks import (
    compression,
    generate,
    gpu,
    kernels,
    prepare,
    rounds,
    sentiment,
    wall_clock,
)
from benchmarks.rounds import compete, wanted
from benchmarks.torch_recipe import exact_loss, make_schedule
from benchmarks.train import judge as judge_training
from benchmarks.train import shape_config
from jaxgpt import OptimizerConfig, load_run
from jaxgpt.interop.nanogpt import read_nanogpt
from jaxgpt.models import build_model
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning.flops import step_flops
from jaxgpt.run import load_config, save_config
from jaxgpt.text.corpus import load_split
from jaxgpt.text.tokenizer import BPETokenizer
from jaxgpt.training.evaluation import evaluate_exactly, make_losses_step
from jaxgpt.training.optimizer import learning_rate_schedule

# Stands for train.py: reaches a loss of 2.0, then waits to be stopped.
REACHES_TWO = """
import json, os, pathlib, signal, sys

def stop(*_):
    (run_dir / "stopped").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
_, preset, _, run_dir = sys.argv
run_dir = pathlib.Path(run_dir)
run_dir.mkdir()
print("compiling the train step", file=sys.stderr)
print(preset, os.environ["JAXGPT_CACHE"], file=sys.stderr, flush=True)
with (run_dir / "metrics.jsonl").open("w") as file:
    for step, loss in ((0, 4.0), (5, 2.0), (10, 1.0)):
        for row in ({"event": "eval", "val_loss": loss}, {"event": "train"}):
            print(json.dumps({"step": step, **row}), file=file, flush=True)
while "smoke" in preset:
    signal.pause()
"""

# Two updates on two streams of a GPU, in nanoseconds; the host's line does not count.
GPU_TRACE = {
    ("/device:GPU:0", "Stream #7(Compute)"): [
        ("nvjet_hsh_128x256_TNN", 0, 400),
        ("loop_convert_fusion_3", 400, 100),
        ("loop_convert_fusion_14", 500, 60),
        ("nvjet_hsh_128x256_TNN", 1000, 400),
    ],
    ("/device:GPU:0", "Stream #9(MemcpyD2D)"): [("MemcpyD2D", 550, 50)],
    ("/device:GPU:0", "XLA Ops"): [("fusion.1", 0, 900)],
    ("/host:CPU", "python"): [("PjitFunction", 0, 5000)],
}

# A contender whose rounds take made-up seconds.
FAKE = """
import os, signal, time

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
            file.write(os.environ.get("WRITES", name))
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

# Its child, which ends when it does, holds 100 MiB.
WAITS_WITH_A_CHILD = """
import subprocess, sys
code = "held = b'1' * (100 << 20); print('started', flush=True); input()"
subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE).wait()
"""

# A program for a GPU. As in XLA's, a fusion hides the number of the loop's iterations.
KERNELS = r"""
%joined (a: f32[64], b: bf16[64]) -> f32[128] {
  %a = f32[64]{0} parameter(0)
  %b = bf16[64]{0} parameter(1)
  %wide = f32[64]{0} convert(%b)
  ROOT %both = f32[128]{0} concatenate(%a, %wide), dimensions={0}
}

%picked (table: bf16[16,8], mask: pred[8], rows: s32[2,1]) -> f32[2,8] {
  %table = bf16[16,8]{1,0} parameter(0)
  %mask = pred[8]{0} parameter(1)
  %masks = pred[16,8]{1,0} broadcast(%mask), dimensions={1}
  %zero.1 = bf16[] constant(0)
  %zeros = bf16[16,8]{1,0} broadcast(%zero.1), dimensions={}
  %masked = bf16[16,8]{1,0} select(%masks, %table, %zeros)
  %same = bf16[16,8]{1,0} bitcast(%masked)
  %rows = s32[2,1]{1,0} parameter(2)
  %taken = bf16[2,8]{1,0} gather(%same, %rows), slice_sizes={1,8}
  ROOT %end = f32[2,8]{1,0} convert(%taken)
}

%changed (all: f32[3,2,8], i: s32[], part: f32[2,8]) -> f32[3,2,8] {
  %all = f32[3,2,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %part = f32[2,8]{1,0} parameter(2)
  %one = f32[1,2,8]{2,1,0} bitcast(%part)
  %zero = s32[] constant(0)
  %new = f32[3,2,8]{2,1,0} dynamic-update-slice(%all, %one, %i, %zero, %zero)
  ROOT %result = f32[3,2,8]{2,1,0} bitcast(%new)
}

%scattered (all: f32[128], i: s32[8,1], parts: bf16[8]) -> f32[128] {
  %all.1 = f32[128]{0} parameter(0)
  %i.1 = s32[8,1]{1,0} parameter(1)
  %parts = bf16[8]{0} parameter(2)
  %wide.1 = f32[8]{0} convert(%parts)
  ROOT %sum = f32[128]{0} scatter(%all.1, %i.1, %wide.1), to_apply=%add
}

%multiplied (ps: f32[2,64], q: bf16[64]) -> (f32[64], s8[33554432]) {
  %ps = f32[2,64]{1,0} parameter(0)
  %q.1 = bf16[64]{0} parameter(1)
  %p.1 = f32[1,64]{1,0} slice(%ps), slice={[0:1], [0:64]}
  %p.2 = f32[64]{0} bitcast(%p.1)
  %product.1 = (f32[64]{0}, s8[33554432]{0}) custom-call(%p.2, %q.1), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dot_general"}
  %first.1 = f32[64]{0} get-tuple-element(%product.1), index=0
  %scratch = s8[33554432]{0} get-tuple-element(%product.1), index=1
  ROOT %pair = (f32[64]{0}, s8[33554432]{0}) tuple(%first.1, %scratch)
}

%less (i: s32[]) -> pred[] {
  %i.2 = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.2, %three), direction=LT
}

%test (state.1: (s32[], f32[3,2,8])) -> pred[] {
  %state.1 = (s32[], f32[3,2,8]{2,1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%state.1), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%i.3), kind=kLoop, calls=%less
}

%body (state: (s32[], f32[3,2,8])) -> (s32[], f32[3,2,8]) {
  %state = (s32[], f32[3,2,8]{2,1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%state), index=0
  %all.2 = f32[3,2,8]{2,1,0} get-tuple-element(%state), index=1
  %table.1 = bf16[16,8]{1,0} constant({...})
  %mask.1 = pred[8]{0} constant({...})
  %rows.1 = s32[2,1]{1,0} constant({...})
  %loop_convert_fusion = f32[2,8]{1,0} fusion(%table.1, %mask.1, %rows.1), calls=%picked
  %loop_dynamic_update_slice_fusion.7 = f32[3,2,8]{2,1,0} fusion(%all.2, %i.4, %loop_convert_fusion), calls=%changed
  ROOT %next = (s32[], f32[3,2,8]{2,1,0}) tuple(%i.4, %loop_dynamic_update_slice_fusion.7)
}

ENTRY %main (p: f32[64], q: bf16[64]) -> f32[128] {
  %p = f32[64]{0} parameter(0)
  %q = bf16[64]{0} parameter(1)
  %start = (s32[], f32[3,2,8]{2,1,0}) constant({...})
  %while = (s32[], f32[3,2,8]{2,1,0}) while(%start), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %copy.1 = bf16[64]{0} copy(%q)
  %copy.2 = bf16[64]{0} copy(%copy.1)
  %product = (f32[64]{0}, s8[33554432]{0}) custom-call(%p, %copy.2), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/dot_general"}
  %ps.1 = f32[2,64]{1,0} constant({...})
  %dynamic_slice_fusion = (f32[64]{0}, s8[33554432]{0}) fusion(%ps.1, %q), calls=%multiplied
  %first = f32[64]{0} get-tuple-element(%product), index=0
  %written = f32[64]{0} custom-call(%first), custom_call_target="__gpu$xla.gpu.triton"
  %loop_concatenate_fusion = f32[128]{0} fusion(%written, %copy.2), calls=%joined
  %i.5 = s32[8,1]{1,0} constant({...})
  %parts.1 = bf16[8]{0} constant({...})
  ROOT %input_scatter_fusion = f32[128]{0} fusion(%loop_concatenate_fusion, %i.5, %parts.1), calls=%scattered
}
"""  # noqa: E501


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Has fake contenders compete; returns what is found, and whose turns it was."""
    (tmp_path / "fake_contender.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(rounds, "_PAUSE", 0)

    def run(count, environments=None, **tasks):
        log = tmp_path / "log"
        tasks = {k: {"name": k, "log": str(log), **task} for k, task in tasks.items()}
        found = compete("fake_contender", tasks, count, environments)
        return found, log.read_text()

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


def test_a_contender_may_have_an_environment_of_its_own(fake):
    _, turns = fake(2, {"b": {"WRITES": "B"}}, a={}, b={}, c={})
    assert turns == "aBccBa"


def test_without_a_gpu_a_command_for_one_ends_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        with pytest.raises(SystemExit, match="GPU"):
            rounds.settle("gpu")
        nvidia_smi = tmp_path / "nvidia-smi"  # one that finds none
        nvidia_smi.write_text("#!/bin/sh\nexit 6\n")
        nvidia_smi.chmod(0o755)


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


def trace_of(lines):
    """A profile with these events; on a line "XLA ops" they have an "hlo_op"."""
    text, stat = "", 'stats { metadata_id: 1 str_value: "op" }'
    for plane, line in lines:
        events = names = ""
        for i, (name, start, duration) in enumerate(lines[plane, line], start=1):
            times = f"offset_ps: {1000 * start} duration_ps: {1000 * duration}"
            ops = stat if line == "XLA ops" else ""
            events += f"events {{ metadata_id: {i} {times} {ops} }}\n"
            names += f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        names += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
        text += (
            f'planes {{ name: "{plane}" lines {{ name: "{line}" {events} }} {names} }}'
        )
    return ProfileData.from_text_proto(text)


def test_a_trace_becomes_a_table_of_kernels_by_time():
    table = gpu.kernel_table(trace_of(GPU_TRACE), updates=2)
    assert table["busy_ms"] == pytest.approx(1000e-6 / 2)  # 10 of the copy overlap
    assert table["idle_ms"] == pytest.approx(400e-6 / 2)
    rows = [tuple(row.values()) for row in table["kernels"]]
    assert rows == [
        ("nvjet_hsh_128x256_TNN", pytest.approx(400e-6), 1, pytest.approx(800 / 1010)),
        ("loop_convert_fusion", pytest.approx(80e-6), 1, pytest.approx(160 / 1010)),
        ("MemcpyD2D", pytest.approx(25e-6), 0.5, pytest.approx(50 / 1010)),
    ]
    names = [row["name"] for row in table["categories"]]
    assert names == ["matrix products", "conversions", "copies"]


def test_on_a_cpu_the_kernels_are_xlas_operations():
    host = {("/host:CPU", "python"): [("PjitFunction", 0, 5000)]}
    with pytest.raises(ValueError, match="kernels"):
        gpu.kernel_table(trace_of(host), updates=1)
    ops = {("/host:CPU", "XLA ops"): [("dot.3", 10, 20)]}
    (row,) = gpu.kernel_table(trace_of(host | ops), updates=1)["kernels"]
    assert (row["name"], row["calls"], row["share"]) == ("dot", 1, 1.0)


def test_a_rows_verdict_is_met_or_missed_or_why_there_is_none():
    ours, theirs = gpu.OURS, gpu.THEIRS
    parts = {
        "typing": {
            "empty cache": {"reached_seconds": 35.0},
            "second run": {"failed": "it ended"},
        },
        "gpt2-124m, 12 rows": {
            "contenders": {
                ours: {"evaluation": {"failed": "no memory"}},
                theirs: {"ratio": 1.09},
            }
        },
        "gpt2-124m, 48 rows": {
            "contenders": {ours: {"mfu": None}, theirs: {"left_out": "no torch"}}
        },
    }
    verdicts = [row["verdict"] for row in gpu.targets(parts, gpu.Arguments())]
    assert verdicts[:3] == ["met", "failed: it ended", "missed"]
    assert verdicts[3:6] == ["left out: no torch", "unknown", "not measured"]
    assert verdicts[6:] == ["failed: no memory"]


def test_a_gpu_is_judged_by_ratios_and_by_its_published_flops():
    ours = rounds_of(600, 2, 2) | {"flops": 989.5e12, "device_kind": "NVIDIA H200"}
    for turn in ours["rounds"]:
        turn["evaluation_seconds"] = 1.0
    ours["rounds"][-1]["kernels"] = {"busy_ms": 1.0}
    ours["evaluation"] = {"tokens": 900}
    unknown = rounds_of(600, 4) | {"flops": 1.0, "device_kind": "Tesla V100"}
    unknown["rounds"][-1]["kernels"] = {}
    failed = {"failed": "no torch"}
    found = gpu.judge({gpu.OURS: ours, "tuned": unknown, gpu.THEIRS: failed})
    assert found[gpu.OURS]["mfu"] == 0.5
    assert found[gpu.OURS]["evaluation"]["ratio"] == 3.0
    assert found[gpu.OURS]["kernels"] == {"busy_ms": 1.0}
    assert (found["tuned"]["mfu"], found["tuned"]["ratio"]) == (None, 2.0)
    assert found[gpu.THEIRS] == {"failed": "no torch"}


def test_rows_of_a_step_can_be_chosen():
    for rows, expected in ((0, 12), (48, 48)):
        config = shape_config("gpt2-124m", "gpu", rows)
        assert config.data.microbatch_size == config.data.batch_size == expected
        assert config.model.block_size == 1024


def test_the_command_is_stopped_where_its_run_reaches_the_loss(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(REACHES_TWO)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    environment = {"JAXGPT_CACHE": "an empty one"}
    arguments = gpu.Arguments(preset="smoke", target=2.0)
    found = gpu.time_to_loss(arguments, tmp_path / "run", environment)
    assert (tmp_path / "run" / "stopped").exists()
    assert (found["step"], found["val_loss"]) == (5, 2.0)
    order = ("first_eval_seconds", "first_train_seconds", "reached_seconds")
    assert 0 < found[order[0]] <= found[order[1]] <= found[order[2]]
    assert found["compilations"] == ["compiling the train step"]
    arguments = gpu.Arguments(preset="ends", target=0.5)
    found = gpu.time_to_loss(arguments, tmp_path / "other", environment)
    assert "an empty one" in found["failed"]
    assert (found["step"], found["val_loss"]) == (10, 1.0)


def test_rows_are_followed_while_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_POLL", 0)
    path = tmp_path / "metrics.jsonl"
    parts = ['{"event": "eval", "st', 'ep": 0}\n{"event"', ': "train", "step": 1}\n']

    def waits():
        with path.open("a") as file:
            file.write(parts.pop(0))
        return bool(parts)

    rows = gpu.follow(path, waits)
    assert next(rows)["step"] == 0
    assert len(parts) == 1
    assert [row["step"] for row in rows] == [1]


@pytest.mark.processes
@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_and_writes_its_report(tmp_path):
    out = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--preset", "smoke", "--shape", "shakespeare-char-cpu"]
    flags += ["--rounds", 2, "--seconds", 0.05, "--parts", "smoke", "--out", out]
    shown, _ = finish(start_script("-m", "benchmarks.gpu", *flags))
    report = json.loads(out.read_text())
    ours, tuned = report["parts"]["smoke"]["contenders"].values()
    for facts in (ours, tuned):
        assert facts["compile_seconds"] > 0
        assert facts["kernels"]["busy_ms"] > 0
        assert f"{facts['tokens_per_second']['median']:,.0f}" in shown
    assert ours["evaluation"]["tokens_per_second"] > 0
    verdicts = [row["verdict"] for row in report["targets"]]
    assert sum(verdict == "not measured" for verdict in verdicts) == len(verdicts) - 1


def test_kernels_are_counted_with_the_bytes_that_they_move():
    found = kernels.groups(KERNELS)
    moved = {group.kind: (group.launches, group.read, group.written) for group in found}
    assert moved == {
        "fusion: concatenate": (1, 256 + 128, 512),
        "cuBLAS matmul": (2, 2 * (256 + 128), 2 * 256),  # without its scratch memory
        "Pallas or Triton": (1, 256, 256),
        "copy": (2, 256, 256),
        "fusion: convert": (3, 3 * (32 + 8 + 8), 3 * 64),  # 2 of the 16 rows of a table
        "fusion: slice": (3, 3 * (4 + 64), 3 * 64),  # a third is changed, in place
        "fusion: other": (1, 32 + 32 + 16, 32),  # adds to 8 of the 128 elements
    }
    assert found == sorted(found, key=lambda group: -group.milliseconds)
    (product,) = (group for group in found if group.kind == "cuBLAS matmul")
    assert (product.shape, product.operation) == ("(f32[64])", "jit(f)/dot_general")


DOCUMENTS = [
    bytes(rng.choice(list(b"aabc "), rng.integers(12)).astype(np.uint8))
    for rng in map(np.random.default_rng, range(150))
]


def symbols_of(documents):
    """The documents as the trigram reads them."""
    pieces = [[*document, compression.END] for document in documents]
    return np.concatenate(pieces).astype(np.uint16)


def trigrams_of(documents):
    """Each symbol of the documents after the two before it."""
    found = []
    for document in documents:
        before = ("start", "start")
        for symbol in [*document, "end"]:
            found.append((*before, symbol))
            before = (before[1], symbol)
    return found


def slow_trigram(train, val):
    """Weights and bits as in `trigram_bits`, by counting in lists."""

    def probs(seen, trigram):
        found = [1 / 257]
        for length in (0, 1, 2):
            context, whole = trigram[2 - length : 2], trigram[2 - length :]
            times = sum(other[2 - length : 2] == context for other in seen)
            same = sum(other[2 - length :] == whole for other in seen)
            found.append(same / times if times else found[-1])
        return np.array(found)

    kept = trigrams_of(d for i, d in enumerate(train) if i % 10 < 9)
    held = [probs(kept, each) for each in trigrams_of(train[9::10])]
    weights = np.full(4, 0.25)
    for _ in range(100):
        shares = sum(weights * each / (weights @ each) for each in held)
        weights = (shares + 1) / (len(held) + 4)
    seen, of_val = trigrams_of(train), trigrams_of(val)
    return weights, -sum(np.log2(weights @ probs(seen, each)) for each in of_val)


def test_the_trigram_has_the_bits_of_a_slow_one(monkeypatch):
    train, val = DOCUMENTS[:130], [*DOCUMENTS[130:], b"a\xffb"]
    expected = slow_trigram(train, val)
    for chunk in (1 << 22, 300):
        monkeypatch.setattr(compression, "_CHUNK", chunk)
        found = compression.trigram_bits(symbols_of(train), symbols_of(val))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
        assert found[1] == pytest.approx(expected[1])


def test_the_trigrams_probabilities_sum_to_1():
    counts = compression.count(symbols_of(DOCUMENTS))
    weights = compression.fit_weights(counts, counts)
    for context in (b"aa", b"a\xff", b"\xff\xff"):  # seen, unseen, unseen in part
        first = (context[0] * 257 + context[1]) * 257
        probs = weights @ compression.components(counts, np.arange(first, first + 257))
        assert probs.min() > 0
        assert probs.sum() == pytest.approx(1)


def test_a_text_without_ends_of_documents_has_a_held_out_tenth():
    part = compression.held_out(np.zeros(990_000, np.uint16))
    assert part.mean() == pytest.approx(0.1, abs=0.01)
    assert compression.held_out(np.zeros(50, np.uint16)).sum() == 5


def test_xz_is_primed_with_the_training_text():
    text = np.random.default_rng(0).bytes(2000)
    alone, primed = compression.xz_bits(b"before " + text + b" after", text)
    assert alone > 8 * len(text)
    assert primed < 1000


def test_tokens_become_bytes_and_ends_of_documents():
    tokenizer = BPETokenizer.train(["caf\u00e9 " * 9], 260)
    documents = ["caf\u00e9", "", "\u20ac \0"]
    end = tokenizer.end_of_text
    ids = [np.append(tokenizer.encode(text), end) for text in documents]
    found = compression.decode(np.concatenate(ids), tokenizer)
    expected = symbols_of([text.encode() for text in documents])
    np.testing.assert_array_equal(found, expected)
    assert compression.to_bytes(found) == "".join(documents).encode()


def test_a_runs_bits_per_byte_are_those_of_its_exact_evaluation(tiny_run, call):
    out, _ = call("jaxgpt", "evaluate", "--run-dir", tiny_run, "--json")
    found = compression.measure(tiny_run, "best")
    assert found["bits_per_byte"]["model"] == json.loads(out)["bits_per_character"]
    assert found["val_bytes"] == 84
    assert found["bits_per_byte"].keys() == found["seconds"].keys()
    assert found["bits_per_byte"]["trigram"] < 1  # the text repeats a sentence


def test_a_run_and_the_baseline_are_measured_on_the_same_test_split(
    untrained, tmp_path, monkeypatch, capsys
):
    name_of = {"no": "Lear", "perhaps": "Puck", "yes": "Romeo"}
    lines = [
        json.dumps({"text": f"{name} tells {n}", "label": label, "source": str(n % 2)})
        for n in range(60)
        for label, name in name_of.items()
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    run_dir = shutil.copytree(untrained / "classifier", tmp_path / "run")
    config = load_config(run_dir)
    config = changed(config, data={"path": (str(tmp_path / "own.jsonl"),)})
    save_config(run_dir, config, None)
    out = tmp_path / "report.json"
    flags = ["--run-dir", str(run_dir), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sentiment", *flags])
    monkeypatch.setattr("jaxgpt.start.start", lambda: None)
    sentiment.main()
    reports = json.loads(out.read_text())["reports"]
    baseline, of_run = reports["TF-IDF"], reports[str(run_dir)]
    assert baseline["accuracy"] == 1  # since a word tells the label
    assert of_run["accuracy"] < 1
    examples = load_split(config, "test", print, load_run(run_dir).tokenizer)
    counts = np.bincount(examples.labels_N).tolist()
    assert min(counts) > 0
    for found in (baseline, of_run):
        assert np.sum(found["confusion"], axis=1).tolist() == counts
        assert found["by_source"].keys() == {"0", "1"}
    assert f"{of_run['macro_f1']:.4g}" in capsys.readouterr().out


def test_runs_of_several_seeds_are_compared_in_pairs():
    rows = [{"accuracy": accuracy} for accuracy in (0.80, 0.82, 0.84)]
    others = [{"accuracy": accuracy} for accuracy in (0.81, 0.84, 0.87)]
    assert sentiment.spread(rows) == {"accuracy": "0.82 ± 0.02"}
    # The standard deviation of 0.01, 0.02 and 0.03 is 0.01, and over the root of 3:
    assert sentiment.difference(rows, others) == {"accuracy": "+0.02 ± 0.0058"}


def test_documents_to_prepare_are_a_kilobyte_each(tmp_path):
    text = "".join(map(chr, range(0x20, 0x3000)))
    found = prepare.write_documents(tmp_path / "d.jsonl", text, 0.02)
    lines = (tmp_path / "d.jsonl").read_text("utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    assert len(set(documents)) == found["documents"]
    assert all(len(document) == 1000 and document in text for document in documents)
    size = sum(len(document.encode()) for document in documents)
    assert 20_000 <= size == found["text_bytes"] < 23_000


def test_preparing_is_judged_by_the_ratio_of_median_speeds():
    ours, theirs = rounds_of(None, 4, 2, 1), rounds_of(None, 1, 3, 1)
    found = prepare.judge({"jaxgpt": ours, "tiktoken": theirs}, 8_000_000)
    assert found["ratio"] == 0.5
    assert found["contenders"]["jaxgpt"]["mb_per_second"]["median"] == 4
    alone = prepare.judge({"jaxgpt": rounds_of(None, 2)}, 8_000_000)
    assert alone["ratio"] is None


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="not Linux")
def test_memory_is_that_of_a_process_and_its_descendants():
    with start_script("-c", WAITS_WITH_A_CHILD) as process:
        try:
            assert process.stdout.readline() == "started\n"
            found = list(prepare.pss(process.pid))
        finally:
            process.kill()
    assert len(found) == 2
    assert max(found) > 100
    assert list(prepare.pss(process.pid)) == []


@pytest.mark.processes
def test_the_benchmark_of_preparing_runs_and_writes_its_report(tmp_path):
    out = tmp_path / "prepare.json"
    flags = ["--megabytes", 0.1, "--rounds", 2, "--out", out]
    shown, _ = finish(start_script("-m", "benchmarks.prepare", *flags))
    report = json.loads(out.read_text())
    assert f"{report['ratio']:.2f}" in shown
    assert report["contenders"]["jaxgpt"]["peak_mib"] > 10
    assert len(report["contenders"]["tiktoken"]["rounds"]) == 2
