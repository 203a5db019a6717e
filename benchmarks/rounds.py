"""Runs contenders in separate processes and measures them in turn, in rounds.

Each contender's process imports only what it measures, builds, warms up and waits. The
parent then asks each for a round, alternately in forward and reverse order, so that
changes in the machine's speed affect all equally; only one computes at a time.
"""

import importlib
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).parent.parent
Device = Literal["cpu", "gpu"]
# Selects the device of every library and keeps it offline; set before any import. On a
# GPU, stops JAX from preallocating the memory that other contenders need.
_ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    "gpu": {
        "JAX_PLATFORMS": "cuda",
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
_PAUSE = 0.3  # seconds before a round, in which waiting threads stop spinning
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")

Facts = dict[str, Any]  # what a contender reports, and what is measured of it
Run = Callable[[], dict[str, float] | None]  # a round, finished when it returns


def main() -> None:
    """A contender's process: builds, prints its facts, then runs a round for each line.

    `compete` runs it as python -m benchmarks.rounds MODULE TASK.
    """
    module, task = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the answers
    sys.stdout = sys.stderr  # which, unlike a pipe, gets each line at once
    facts, run = importlib.import_module(module).build(**json.loads(task))
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        more = run() or {}
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, **more}), file=answers, flush=True)


def settle(device: Device) -> None:
    """Selects the device of this process and its contenders; avoids logs about it.

    Exits if it is a GPU and there is none.
    """
    if device == "gpu" and not gpus():
        sys.exit("nvidia-smi finds no GPU here; give --device cpu")
    os.environ |= _ENVIRONMENT[device]


def gpus() -> list[str]:
    """Name and driver of each NVIDIA GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()
    except (OSError, subprocess.CalledProcessError):  # it is missing, or finds none
        return []


def torch_device() -> Any:
    """PyTorch's device, with its usual settings."""
    import torch

    if os.environ["JAX_PLATFORMS"] == "cpu":
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32, as in JAX
    return torch.device("cuda")


def calls_in(seconds: float, call: Callable[[], Any]) -> int:
    """Number of calls that take about `seconds`, at least 1; the first warms up."""
    call()
    started = time.perf_counter()
    call()
    return max(1, round(seconds / (time.perf_counter() - started)))


def compete(
    module: str,
    tasks: dict[str, Facts],
    rounds: int,
    environments: Mapping[str, dict[str, str]] | None = None,
) -> dict[str, Facts]:
    """Starts all contenders one after the other, then asks each for its rounds.

    Args:
      module: name of a module with `build(**task)`, which returns facts and a function
        that runs a round; this may return more figures than the seconds it takes.
      tasks: arguments of `build` for each contender, by its name; plain values.
      rounds: number of rounds; every other one is in reverse order.
      environments: environment variables of some contenders, in addition to ours.

    Returns each contender's facts with its `rounds` and its `peak_mib` of memory, or
    how it `failed`, or why it was `left_out`: memory is short. The peak is the one that
    the last round reports, or else that of the process since its start.
    """
    found: dict[str, Facts] = {}
    command = [sys.executable, "-m", "benchmarks.rounds", module]
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, subprocess.Popen[str]] = {}
        try:
            for number, (name, task) in enumerate(tasks.items()):
                if reason := _out_of_memory([child.pid for child in running.values()]):
                    found[name] = {"left_out": reason}
                    _log(f"{name} is left out: {reason}")
                    continue
                _log(f"{name}: starting")
                errors = Path(folder) / str(number)
                with errors.open("w") as stderr:
                    running[name] = subprocess.Popen(
                        [*command, json.dumps(task)],
                        cwd=ROOT,
                        env=os.environ | (environments or {}).get(name, {}),
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                found[name] = {"rounds": [], "errors": errors}
                _read_answer(running, found, name)
            for number in range(rounds):
                _log(f"round {number + 1} of {rounds}")
                for name in list(running)[:: -1 if number % 2 else 1]:
                    _request_round(running[name])
                    _read_answer(running, found, name)
            for name, child in running.items():
                last = found[name]["rounds"][-1]
                found[name]["peak_mib"] = last.get("peak_mib") or peak_mib(child.pid)
        finally:
            for child in running.values():
                child.communicate()  # closing its stdin ends it
    return {
        name: {key: fact for key, fact in facts.items() if key != "errors"}
        for name, facts in found.items()
    }


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _request_round(child: subprocess.Popen[str]) -> None:
    time.sleep(_PAUSE)
    assert child.stdin
    with suppress(BrokenPipeError):  # it has died; _read_answer reports it
        print("round", file=child.stdin, flush=True)


def _read_answer(
    running: dict[str, subprocess.Popen[str]], found: dict[str, Facts], name: str
) -> None:
    """Records a contender's answer, or its failure if it has died."""
    child, facts = running[name], found[name]
    assert child.stdout
    if line := child.stdout.readline():
        answer = json.loads(line)
        if "seconds" in answer:
            facts["rounds"].append(answer)
        else:
            facts.update(answer)
        return
    child.communicate()
    lines = facts["errors"].read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else f"exit status {child.returncode}"
    if child.returncode == -signal.SIGKILL:
        last = "killed, as the system does if memory runs out"
    found[name] = {"failed": last}
    _log(f"{name} failed: {last}")
    del running[name]


def _out_of_memory(pids: list[int]) -> str:
    """Why memory is too short for another process like these; empty if it is not."""
    needed = 1.25 * max((peak_mib(pid) or 0 for pid in pids), default=0)
    left = psutil.virtual_memory().available / 2**20
    if left > needed:
        return ""
    return f"out of memory: {left:.0f} MiB left, {needed:.0f} MiB may be needed"


def peak_mib(pid: int) -> float | None:
    """Peak resident memory of a process; None if the system does not report it."""
    status = Path(f"/proc/{pid}/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        return int(peak[1]) / 1024
    return None


def rates(facts: Facts, amount: str) -> dict[str, float]:
    """Median, lowest and highest amount per second over a contender's rounds."""
    each = [facts[amount] / turn["seconds"] for turn in facts["rounds"]]
    return {
        "median": statistics.median(each),
        "lowest": min(each),
        "highest": max(each),
    }


def reasons(facts: Facts) -> str:
    """Why a contender without rounds has none, as "left out: ..." or "failed: ..."."""
    return "; ".join(f"{how.replace('_', ' ')}: {why}" for how, why in facts.items())


def machine(module: str, device: Device = "cpu") -> Facts:
    """The command, date, machine and library versions of a report."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(
        r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else ""
    )
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {
            "cpu": model[1] if model else platform.processor(),
            "gpu": gpus() if device == "gpu" else [],
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{library: _version(library) for library in _LIBRARIES},
        },
    }


def _version(library: str) -> str | None:
    """The installed version, or None: a contender may be absent."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def wanted(names: Collection[str], parts: tuple[str, ...]) -> list[str]:
    """The names that contain one of the parts, or all names if no part is given.

    Exits with the names if a part is in none of them.
    """
    for part in parts:
        if not any(part in name for name in names):
            sys.exit(f"{part!r} is in none of the names: {'; '.join(names)}")
    return [name for name in names if not parts or any(part in name for part in parts)]


def write_json(path: Path, report: Facts) -> None:
    """Writes a report atomically."""
    tmp_path = path.with_name(path.name + ".tmp")
    tmp_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    tmp_path.replace(path)


if __name__ == "__main__":
    main()
