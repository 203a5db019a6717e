"""Checks a long run for leaks: memory and open files over 20,000 steps of `smoke`.

python -m benchmarks.long_run

The training runs in its own process, evaluates, plots and saves as any run does, and is
measured from outside. Writes benchmarks/long_run.json and long_run.png.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import psutil
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
_UNITS = {"memory_mib": "resident memory, MiB", "open_files": "open files"}

Sample = dict[str, float]


@dataclass(frozen=True)
class Arguments:
    """Trains for long, and reports how much memory and how many files it holds."""

    steps: int = 20_000  # total updates
    settled: int = 2_000  # updates after which nothing should grow
    window: int = 1_000  # updates per median: from settled on, and the last
    interval: int = 500  # updates between evaluations, plots and checkpoints
    out: Path = HERE / "long_run"  # writes OUT.json and OUT.png


def main() -> int:
    """Measures, reports and plots; returns 1 if memory grows by 2%, or files at all."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.long_run")
    settled, end = arguments.settled, arguments.steps - arguments.window
    if end < settled + arguments.window:
        sys.exit("steps must be at least settled plus two windows; raise --steps")
    samples = list(measure(arguments.steps, arguments.interval))
    figures = {
        name: {
            "before": median(samples, name, settled, arguments.window),
            "after": median(samples, name, end, arguments.window),
        }
        for name in _UNITS
    }
    for name, unit in _UNITS.items():
        before, after = figures[name]["before"], figures[name]["after"]
        figures[name]["growth_percent"] = growth = 100 * (after / before - 1)
        print(f"{unit:22}{before:8.1f} ->{after:8.1f}  {growth:+.2f}%")
    report = {
        "command": "python -m benchmarks.long_run " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{platform.platform()}, {psutil.cpu_count()} cores",
        "steps": arguments.steps,
        "saves": arguments.steps // arguments.interval,
        **figures,
        "samples": samples,
    }
    text = json.dumps(report, indent=1) + "\n"
    arguments.out.with_suffix(".json").write_text(text, encoding="utf-8")
    draw(samples, settled, arguments.out.with_suffix(".png"))
    grows = [figures[name]["growth_percent"] for name in ("memory_mib", "open_files")]
    return int(grows[0] >= 2 or grows[1] > 0)


def measure(steps: int, interval: int) -> Iterator[Sample]:
    """Trains in a separate process, and yields samples of it, ten per second."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [
            *(sys.executable, "train.py", "smoke", "--out-dir", str(run_dir)),
            *("--train.max-steps", str(steps), "--train.eval-interval", str(interval)),
            *("--train.checkpoint-interval", str(interval)),
        ]
        with (Path(folder) / "log").open("w+") as log:
            training = subprocess.Popen(
                command, cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT
            )
            process = psutil.Process(training.pid)
            while training.poll() is None:
                time.sleep(0.1)
                step = last_step(run_dir / "metrics.jsonl")
                if not 0 < step < steps:  # it is starting up or generating text
                    continue
                with suppress(psutil.Error):
                    memory = process.memory_info().rss / 2**20
                    files = process.num_fds()
                    yield {"step": step, "memory_mib": memory, "open_files": files}
            if training.returncode:
                log.seek(0)
                sys.exit(f"the training failed:\n{log.read()[-2000:]}")


def last_step(metrics: Path) -> int:
    """The step of the last complete row, read without the rows before it."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 1000))
        rows = file.read().split(b"\n")[1:-1]
    return json.loads(rows[-1])["step"] if rows else 0


def median(samples: list[Sample], name: str, first: int, steps: int) -> float:
    """The median over `steps` steps, starting at `first`."""
    window = range(first, first + steps)
    return statistics.median(s[name] for s in samples if s["step"] in window)


def draw(samples: list[Sample], settled: int, path: Path) -> None:
    """Plots memory and open files against the step, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    steps = [sample["step"] for sample in samples]
    for axes, (name, unit) in zip(
        figure.subplots(2, sharex=True), _UNITS.items(), strict=True
    ):
        axes.plot(steps, [sample[name] for sample in samples], linewidth=0.8)
        axes.axvline(settled, color="grey", linewidth=0.8, linestyle=":")
        axes.set(ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.set(xlabel="step")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
