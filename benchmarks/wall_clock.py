"""Seconds from typing a command to the first step and to the final loss, vs. PyTorch.

python -m benchmarks.wall_clock [--rounds N]

- To the first step: `python train.py shakespeare-char-cpu`, one step per dispatch,
  until the first is logged; with an empty compilation cache, then with a filled one.
- To the loss on the whole validation split: `shakespeare-char-fast`,
  `shakespeare-char-cpu`, and the latter's recipe, nanoGPT's, in PyTorch
  (benchmarks/torch_recipe.py), eager as in nanoGPT on a CPU, and compiled. PyTorch
  skips intermediate evaluations and checkpoints. Both reuse what was compiled before.

All commands take turns. Writes benchmarks/wall_clock.json.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.rounds import ROOT, machine, settle, write_json
from benchmarks.train import shape_config

OUT = Path(__file__).with_suffix(".json")
_ONE_STEP = "--train.max-steps 2 --train.steps-per-call 1 --train.log-interval 1"
_FIRST_STEP, _LOSS = r"step 1/", r"val loss ([\d.]+) on the whole split"


@dataclass(frozen=True)
class Arguments:
    """Measures the time from typing a command to its first step and its final loss."""

    rounds: int = 3  # rounds per command, in turn
    out: Path = OUT  # the report


def main() -> None:
    """Measures all commands, prints the results and writes the report."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.wall_clock")
    settle("cpu")
    report = machine("benchmarks.wall_clock")
    seconds: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, took, line in one_round():
            print(f"{name:30}{took:7.1f} s  {line.strip()}", flush=True)
            seconds.setdefault(name, []).append(took)
            if loss := re.search(_LOSS, line):
                losses.setdefault(name, []).append(float(loss[1]))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = judge(medians)
    for name, value in (medians | ratios).items():
        print(f"{name:45}{value:8.2f}")
    found = {"seconds": seconds, "val_loss": losses, "ratios": ratios}
    write_json(arguments.out, report | found)


def one_round() -> Iterator[tuple[str, float, str]]:
    """Yields each command's name, its seconds and the line that was waited for."""
    from jaxgpt.start import cache_dir

    config = json.dumps(shape_config("shakespeare-char-cpu").to_dict())
    torch = ["-m", "benchmarks.torch_recipe", str(cache_dir() / "tinyshakespeare.txt")]
    with tempfile.TemporaryDirectory() as folder:
        fast, slow = (
            ["train.py", preset, "--overwrite", "--out-dir", f"{folder}/run"]
            for preset in ("shakespeare-char-fast", "shakespeare-char-cpu")
        )
        environment = {  # as start.start sets it, but in this folder
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/xla",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        for name in ("first start", "second start"):
            yield name, *wait_for(_FIRST_STEP, [*slow, *_ONE_STEP.split()], environment)
        shutil.rmtree(f"{folder}/run")
        for name, command in {
            "jaxgpt fast": fast,
            "jaxgpt": slow,
            "torch eager": [*torch, config],
            "torch compile": [*torch, config, "--compile"],
        }.items():
            yield name, *wait_for(_LOSS, command, {})


def wait_for(
    mark: str, command: list[str], environment: dict[str, str]
) -> tuple[float, str]:
    """Seconds until `python COMMAND` prints a line with `mark`, and that line.

    Waits for it to end. Raises RuntimeError with its output if it fails or has none.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        lines = [(time.perf_counter() - started, line) for line in process.stdout]
    found = [(seconds, line) for seconds, line in lines if re.search(mark, line)]
    if process.returncode or not found:
        raise RuntimeError("".join(line for _, line in lines))
    return found[0]


def judge(seconds: dict[str, float]) -> dict[str, float]:
    """Ratios of the two starts, and of our times to the faster of PyTorch's."""
    torch = min(seconds["torch eager"], seconds["torch compile"])
    return {
        "second start by first start": seconds["second start"] / seconds["first start"],
        "jaxgpt fast by the fastest of torch": seconds["jaxgpt fast"] / torch,
        "jaxgpt by the fastest of torch": seconds["jaxgpt"] / torch,
    }


if __name__ == "__main__":
    main()
