"""What the benchmarks share: contenders in processes of their own, in turn.

Each contender's process imports only what it measures, builds, warms up and waits. The
parent then asks one after the other for a round, forwards and backwards, so that what
the machine does meanwhile falls on all alike; only one computes at a time.
"""

import importlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).parent.parent
Device = Literal["cpu", "gpu"]
# Every library there, and without a look at the web; set before it is imported. On a
# GPU, no contender takes the others' memory.
_ENVIRONMENT = {
    "cpu": {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    "gpu": {
        "JAX_PLATFORMS": "cuda",
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
_PAUSE = 0.3  # seconds after a round, in which waiting threads cease to spin
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")

Facts = dict[str, Any]  # what a contender tells of itself, and what is found of it
Run = Callable[[], dict[str, float] | None]  # a round, finished when it returns


def main() -> None:
    """A contender's side: builds, says what it is, then runs a round for each line.

    python -m benchmarks.rounds MODULE TASK, as `compete` runs it.
    """
    module, task = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    facts, run = importlib.import_module(module).build(**json.loads(task))
    print(json.dumps(facts), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        more = run() or {}
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, **more}), file=answers, flush=True)


def settle(device: Device) -> None:
    """Has this process and its contenders compute there, and print no logs for it."""
    os.environ |= _ENVIRONMENT[device]


def torch_device() -> Any:
    """Where PyTorch computes, settled as is usual there."""
    import torch

    if os.environ["JAX_PLATFORMS"] == "cpu":
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
    return torch.device("cuda")


def calls_in(seconds: float, call: Callable[[], Any]) -> int:
    """How many calls take about as long, at least 1; the first warms up."""
    call()
    started = time.perf_counter()
    call()
    return max(1, round(seconds / (time.perf_counter() - started)))


def compete(module: str, tasks: dict[str, Facts], rounds: int) -> dict[str, Facts]:
    """Starts all contenders one after the other, and then asks each for its rounds.

    Args:
      module: has `build(**task)`, which returns facts and a function that runs a
        round, and may tell of more than the seconds that it takes.
      tasks: of each contender, by its name; plain values.
      rounds: how many; every other one goes backwards.

    Returns each contender's facts with its `rounds` and its `peak_mib` of memory, or
    how it `failed`. The peak is what the last round tells, or else of the whole process
    from its start.
    """
    found: dict[str, Facts] = {}
    command = [sys.executable, "-m", "benchmarks.rounds", module]
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, subprocess.Popen[str]] = {}
        try:
            for number, (name, task) in enumerate(tasks.items()):
                if failed := _no_room([child.pid for child in running.values()]):
                    found[name] = {"failed": failed}
                    _log(f"{name} failed: {failed}")
                    continue
                _log(f"{name} gets ready")
                errors = Path(folder) / str(number)
                with errors.open("w") as stderr:
                    running[name] = subprocess.Popen(
                        [*command, json.dumps(task)],
                        cwd=ROOT,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=stderr,
                        text=True,
                    )
                found[name] = {"rounds": [], "errors": errors}
                _hear(running, found, name)
            for number in range(rounds):
                _log(f"round {number + 1} of {rounds}")
                for name in list(running)[:: -1 if number % 2 else 1]:
                    _ask(running[name])
                    _hear(running, found, name)
            for name, child in running.items():
                last = found[name]["rounds"][-1]
                found[name]["peak_mib"] = last.get("peak_mib") or peak_mib(child.pid)
        finally:
            for child in running.values():
                child.communicate()  # the end of its input is its end
    return {
        name: {key: fact for key, fact in facts.items() if key != "errors"}
        for name, facts in found.items()
    }


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _ask(child: subprocess.Popen[str]) -> None:
    time.sleep(_PAUSE)
    assert child.stdin
    with suppress(BrokenPipeError):  # it has died, as is heard next
        print("round", file=child.stdin, flush=True)


def _hear(
    running: dict[str, subprocess.Popen[str]], found: dict[str, Facts], name: str
) -> None:
    """Notes what a contender answers; one that has died runs no more."""
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
    found[name] = {"failed": last}
    _log(f"{name} failed: {last}")
    del running[name]


def _no_room(pids: list[int]) -> str:
    """Why there is no memory for another process like these; empty if there is."""
    needed = 1.25 * max((peak_mib(pid) or 0 for pid in pids), default=0)
    left = psutil.virtual_memory().available / 2**20
    if left > needed:
        return ""
    return f"{left:.0f} MiB of memory are left, {needed:.0f} may be needed"


def peak_mib(pid: int) -> float | None:
    """The most memory that a process has held; None where the system does not say."""
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


def machine(module: str, device: Device = "cpu") -> Facts:
    """What it was measured on, when, and by which command."""
    cpuinfo = Path("/proc/cpuinfo")
    gpus = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    model = re.search(
        r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else ""
    )
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "machine": {
            "cpu": model[1] if model else platform.processor(),
            "gpu": subprocess.check_output(gpus, text=True).splitlines()
            if device == "gpu"
            else [],
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in _LIBRARIES},
        },
    }


def wanted(names: Iterable[str], parts: tuple[str, ...]) -> list[str]:
    """The names that hold one of the parts, or all where no part is given."""
    return [name for name in names if not parts or any(part in name for part in parts)]


def write_json(path: Path, report: Facts) -> None:
    """Writes a report, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()
