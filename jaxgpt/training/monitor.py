"""Reports on a run while it trains: metrics.jsonl, progress and the loss curve."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.config import Config
from jaxgpt.files import is_first_process, replace_file
from jaxgpt.terminal import counter, log_line, progress
from jaxgpt.text.tasks import kind_of
from jaxgpt.training.loggers import open_logger

METRICS = "metrics.jsonl"
CURVE = "loss.png"
REWARDS = "reward.png"
_STEP_METRICS = ("loss", "learning_rate", "grad_norm")
_LINE_SECONDS = 1.0  # at least between lines of steps where there is no terminal
_POINTS = 2000  # maximum number of points in the curve of training losses


class Monitor(AbstractContextManager):
    """Context that writes metrics.jsonl and shows progress.

    Progress is a bar on a terminal, and plain lines elsewhere. Rows are on disk once
    `flush` returns, so a checkpoint saved after that never has missing rows. Only the
    first process writes and shows anything; all check that values are finite.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        resumed_step: int | None,
        started: float,
        skipped: int = 0,
    ):
        """Keeps the run's rows up to `resumed_step`, or starts anew if it is None.

        Args:
          started: start time of this process, by `time.monotonic`.
          skipped: number of steps skipped by the run so far.
        """
        self._curve = run_dir / CURVE
        self._path = run_dir / METRICS if is_first_process() else Path(os.devnull)
        last = None
        if is_first_process():
            last = rewind(self._path, -1 if resumed_step is None else resumed_step)
        self._started = started - (last["elapsed_seconds"] if last else 0.0)
        self._file = self._path.open("a", encoding="utf-8")
        self._config = config.train
        units = {"classification": "example", "preferences": "pair"}
        self._loss = f"loss, nats per {units.get(kind_of(config), 'token')}"
        if config.rewarded:
            self._loss = "loss: beta KL - reward, per response"
        self._rewards = run_dir / REWARDS if config.rewarded else None
        self._stack, elapsed = ExitStack(), time.monotonic() - self._started
        self._loggers = [
            self._stack.enter_context(open_logger(name, run_dir, config, elapsed))
            for name in (set(config.train.log_to) if is_first_process() else ())
        ]
        for row in read_rows(self._path) if self._loggers else ():
            self._log(row)
        self._pending: tuple[int, Mapping[str, jax.Array], float] | None = None
        self._last_end = 0.0
        self._said = -math.inf  # when the last line of steps was printed
        self._skipped = skipped
        console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal and is_first_process()),
        )
        self._task = self._bar.add_task(
            "",
            total=config.train.max_steps,
            completed=resumed_step or 0,
            status="starting",
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()
        self._file.close()
        self._stack.__exit__(*exception)

    def show(self, status: str) -> None:
        """Shows on the bar what takes time, other than steps."""
        self._bar.update(self._task, status=status)

    def evaluating(self, batches: int) -> Callable[[int], None]:
        """Shows an evaluation; returns a function to call with the batches done."""
        self.show(label := "evaluating")

        def show(done: int) -> None:
            self.show(f"{label} {done / batches:.0%}")

        return counter(label, batches, None if self._bar.disable else show)

    @contextmanager
    def last_evaluation(
        self, parameters: str, predictions: int
    ) -> Iterator[Callable[[int], None]]:
        """Shows the progress of an exact evaluation in place of the steps'."""
        self._bar.stop()
        label = f"loss of the {parameters} on the whole val split"
        with progress(label, predictions) as advance:
            yield advance

    def train(
        self, steps_before: int, metrics: Mapping[str, jax.Array], started: float
    ) -> None:
        """Takes the metrics of a dispatch, and logs those of the previous dispatch.

        The device thus runs a dispatch while the metrics of the previous one are read.

        Args:
          steps_before: updates completed before the dispatch.
          metrics: the train step's metrics of N steps, each [N].
          started: time of the dispatch, by `time.monotonic`.
        """
        self._log_pending()
        self._pending = (steps_before, metrics, started)
        if isinstance(metrics["loss"], np.ndarray):  # no device runs ahead
            self._log_pending()

    def flush(self) -> None:
        """Logs all metrics taken so far; returns once their rows are on disk.

        Raises FloatingPointError that names the step with a non-finite value, if no
        more steps may be skipped.
        """
        self._log_pending()
        self._sync()

    def eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs an evaluation after `step` updates, and draws the loss curve.

        Returns once its row is on disk.

        Args:
          step: completed updates.
          metrics: the result of `estimate` for the splits "train" and "val".
        """
        self._log_pending()
        check_finite(step, metrics)
        self._write("eval", step, **metrics)
        self._sync()
        shown = (f"{name.replace('_', ' ')} {n:.4f}" for name, n in metrics.items())
        self._say(f"step {step}: {', '.join(shown)}")
        if step and is_first_process():  # at step 0 there is no curve yet
            plot_losses(self._path, self._curve, self._loss)
            if self._rewards:
                plot_rewards(self._path, self._rewards)

    def done(
        self, step: int, exact: Mapping[int, float], best_step: int | None
    ) -> None:
        """Logs the end of training after `step` updates.

        Args:
          exact: the exact loss on the validation split by step, of the last step and of
            the best checkpoint's.
          best_step: step of the best checkpoint; None if none can be restored.
        """
        val_loss = exact[step]
        check_finite(step, {"val_loss": val_loss})
        rows = read_rows(self._path)
        evaluated = (row["val_loss"] for row in rows if row["event"] == "eval")
        row = {"val_loss": val_loss, "best_val_loss": min(evaluated, default=val_loss)}
        row["best_exact_val_loss"] = math.nan if best_step is None else exact[best_step]
        self._write("done", step, **row)
        seconds = time.monotonic() - self._started
        line = f"done in {seconds:.1f} s: val loss {val_loss:.4f} on the whole split"
        if best_step == step:
            line += "; the last checkpoint is the best"
        elif best_step is not None:
            best = f"{exact[best_step]:.4f} at step {best_step}"
            line += f" at step {step}; the best checkpoint has {best}"
        skipped = f", {self._skipped} steps skipped" if self._skipped else ""
        self._say(line + skipped)

    def _log_pending(self) -> None:
        if not self._pending:
            return
        steps_before, metrics, started = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)  # waits for the dispatch
        end = time.monotonic()
        rate = float(metrics["tokens"].sum()) / (end - max(started, self._last_end))
        self._last_end = end
        others = metrics.keys() - {*_STEP_METRICS, "tokens", "skipped"}
        names = (*_STEP_METRICS, *sorted(others))  # others are the objective's
        columns, row_written = (metrics[name].tolist() for name in names), False
        rows = zip(metrics["skipped"].tolist(), *columns, strict=True)
        for step, (skipped, *row) in enumerate(rows, steps_before + 1):
            values = dict(zip(names, row, strict=True))
            bad = non_finite(values) if skipped > self._skipped else {}
            self._skipped = skipped
            if bad:
                if skipped > self._config.max_skipped_steps:
                    check_finite(step, values)
                found = ", ".join(f"{name} is {value}" for name, value in bad.items())
                so_far = f"{skipped} of at most {self._config.max_skipped_steps}"
                self._say(f"step {step} is skipped, {so_far}: {found}")
            if step % self._config.log_interval == 0:
                self._write("train", step, **values, tokens_per_second=rate)
                row_written = True
        status = f"loss {values['loss']:.4f}  {rate:,.0f} tok/s"
        self._bar.update(self._task, completed=step, status=status)
        due = step == self._config.max_steps or end - self._said >= _LINE_SECONDS
        if self._bar.disable and row_written and due:
            self._said = end
            log_line(f"step {step}/{self._config.max_steps}  {status}")

    def _sync(self) -> None:
        if is_first_process():
            os.fsync(self._file.fileno())

    def _write(self, event: str, step: int, **values: float) -> None:
        elapsed = time.monotonic() - self._started
        row = {"event": event, "step": step, **values, "elapsed_seconds": elapsed}
        row |= dict.fromkeys(non_finite(values))  # null, as JSON has no inf or NaN
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        for log in self._loggers:
            log(row)

    def _say(self, line: str) -> None:
        if self._bar.disable:
            log_line(line)
        else:
            self._bar.console.print(line, markup=False)


def non_finite(values: Mapping[str, float]) -> dict[str, float]:
    """The values that are not finite."""
    return {name: value for name, value in values.items() if not math.isfinite(value)}


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises FloatingPointError that names the step if a value is not finite."""
    for name, value in non_finite(values).items():
        raise FloatingPointError(
            f"{name} is {value} at step {step}; earlier checkpoints are kept. Resume "
            "with a lower --optimizer.learning-rate, or start over"
        )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of metrics.jsonl, if it exists, without partial lines."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and {"event", "step"} <= row.keys():
                    yield row


def rewind(path: Path, step: int) -> dict[str, Any] | None:
    """Deletes partial lines, rows after `step`, and "done" rows from metrics.jsonl.

    Returns the last row kept, or None.
    """
    last = None

    def write(tmp_path: Path) -> None:
        nonlocal last
        with tmp_path.open("w", encoding="utf-8") as file:
            for row in read_rows(path):
                if row["step"] <= step and row["event"] != "done":
                    last = row
                    file.write(json.dumps(row) + "\n")

    replace_file(path, write)
    return last


def plot_losses(metrics: Path, picture: Path, label: str) -> None:
    """Plots the losses of steps and of evaluations to a PNG file.

    Args:
      metrics: path of metrics.jsonl, which must have an evaluation.
      picture: path to write.
      label: says what a loss is.
    """
    from matplotlib.figure import Figure  # takes 0.5 s, and only needed here

    steps, evals = [], []
    for row in read_rows(metrics):
        if row["event"] == "train":
            steps.append((row["step"], row["loss"]))
        elif row["event"] == "eval":
            evals.append((row["step"], row["train_loss"], row["val_loss"]))
    drawn = steps[:: 1 + len(steps) // _POINTS]
    at, train_losses, val_losses = zip(*evals, strict=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [step for step, _ in drawn],
        [loss for _, loss in drawn],
        color="C0",
        alpha=0.35,
        linewidth=0.8,
        label="train, each batch",
    )
    axes.plot(at, train_losses, color="C0", marker=".", label="train, evaluated")
    axes.plot(at, val_losses, color="C1", marker=".", label="val, evaluated")
    best, step = min(zip(val_losses, at, strict=True))
    axes.annotate(
        f"{best:.3f}",
        (step, best),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
        color="C1",
    )
    axes.set(xlabel="step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    replace_file(picture, lambda path: figure.savefig(path, format="png", dpi=120))


def plot_rewards(metrics: Path, picture: Path) -> None:
    """Plots PPO's rewards against the root of the divergence to a PNG file.

    The rewards are scaled, and less the penalty for responses without an end.
    Source: Gao et al. 2022, figure 1. Takes paths as `plot_losses` does.
    """
    from matplotlib.figure import Figure

    rows = list(read_rows(metrics))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for event, prefix, style in (
        ("train", "", {"color": "C0", "alpha": 0.35, "linestyle": ""}),
        ("eval", "val_", {"color": "C1"}),
    ):
        of_event = [row for row in rows if row["event"] == event]
        roots = [max(row[f"{prefix}kl"], 0) ** 0.5 for row in of_event]
        rewards = [row[f"{prefix}reward"] for row in of_event]
        label = "val, evaluated" if prefix else "train, each iteration"
        axes.plot(roots, rewards, marker=".", label=label, **style)
    axes.set(xlabel="square root of KL from the reference in nats", ylabel="reward")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    replace_file(picture, lambda path: figure.savefig(path, format="png", dpi=120))
