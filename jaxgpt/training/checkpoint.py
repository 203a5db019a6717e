"""Checkpoints through Orbax: the best and the latest two, saved in the background.

A checkpoint has two parts: `params`, which generation reads alone, and `progress`, what
a resume needs besides. Its record has a checksum of every array: one that is restored
with another is never used.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxgpt.files import is_first_process, log_line
from jaxgpt.parallel.processes import any_failed, several_processes, wait_for_all
from jaxgpt.start import release_memory
from jaxgpt.training.record import (
    check_shapes,
    checksums,
    make_record,
    read_record,
    shapes,
)
from jaxgpt.training.step import TrainState

CHECKPOINTS = "checkpoints"


class _DamageError(ValueError):
    """A checkpoint is not as it was saved."""


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in `folder`, to add to; leaves once all are saved.

    Makes the folder, and clears it of saves cut off. Raises OSError if a save fails.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_BestAndLatestTwo(folder),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # metadata of damaged checkpoints is not read
    )
    checkpoints = ocp.CheckpointManager(folder.absolute(), options=options)
    try:
        yield checkpoints
    finally:
        with _clear_save_errors():
            checkpoints.close()


@dataclass(frozen=True)
class _BestAndLatestTwo(checkpoint_managers.PreservationPolicy):
    """What Orbax keeps; the last but one too, as the last might turn out damaged."""

    folder: Path

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        *before, last = checkpoints
        metrics = _metrics(self.folder, [info.step for info in before], math.inf)
        metrics[last.step] = last.metrics["figure"]  # whose record is not written yet
        kept = {_best_first(metrics)[0], *list(metrics)[-2:]}
        return [step in kept for step in metrics]


def save_state(
    checkpoints: ocp.CheckpointManager, state: TrainState, metric: float | None
) -> None:
    """Starts to save `state`; returns once the arrays are copied.

    Args:
      checkpoints: as `open_checkpoints` gives them.
      state: of training; of parameters only where its opt_state is None.
      metric: the objective's validation metric of these very parameters, lower is
        better; None if they were not evaluated, and the checkpoint then never counts as
        the best.

    Raises OSError if the save before has failed.
    """
    step, parts = int(state.step), _parts(state)
    args = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
    record = make_record(parts, math.inf if metric is None else metric)
    with _clear_save_errors():
        if not checkpoints.save(
            step,
            args=ocp.args.Composite(**args),
            metrics=record,  # which only the policy reads
            custom_metadata=record,
        ):
            raise ValueError(f"there is a checkpoint of a step after {step}")


def _parts(state: TrainState) -> dict[str, Any]:
    if state.opt_state is None:
        return {"params": state.params}
    names = ("step", "opt_state", "skipped")
    progress = {name: getattr(state, name) for name in names}
    return {"params": state.params, "progress": progress}


def check_saves(checkpoints: ocp.CheckpointManager, saved: int | None) -> int | None:
    """The newest step that is saved; gives back a save's memory if it is not `saved`.

    Raises OSError if a save in the background has failed; waits for none.
    """
    with _clear_save_errors():
        if checkpoints.is_saving_in_progress():
            return saved
        checkpoints.wait_until_finished()  # raises what the save has left
    if (newest := checkpoints.latest_step()) != saved:
        release_memory()
    return newest


@contextmanager
def _clear_save_errors() -> Iterator[None]:
    """Turns what a failed save raises into an error that says what to do."""
    try:
        yield
    except Exception as error:
        lost = (RuntimeError, TimeoutError, AssertionError)
        if several_processes() and isinstance(error, lost):
            raise  # it is of the run's other processes, and not of files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"a checkpoint could not be saved ({reason}); those from before are kept. "
            "Make room, if that is it, and go on with --resume"
        ) from error


def restore_state(
    folder: Path, which: str | int, abstract: TrainState, *, resume: bool = False
) -> TrainState:
    """Reads a checkpoint, placed as `abstract` is.

    A damaged one is told of, and instead of the best or the latest the next best, or
    the one before, is taken. Where none was evaluated, the best is the latest.

    Args:
      folder: of the checkpoints.
      which: "best", "latest" or a step.
      abstract: shapes, dtypes and shardings. If its opt_state is None, parameters only
        are read; the result's is None if only they were saved.
      resume: requires an opt_state, and renames damaged checkpoints, so that their
        steps can be saved again.

    Raises ValueError that lists the steps there are, or what is wrong with them, or
    that names the first parameter of another shape.
    """
    faults = {}
    for step in find_steps(folder, which):
        try:
            parts = _restore(folder / str(step), _parts(abstract))
            break
        except _DamageError as error:
            faults[step] = str(error)
    else:
        other = f"move {folder} away to begin at step 0" if resume else "take another"
        listed = "; ".join(faults.values())
        raise ValueError(f"{listed}; bring it back from a copy, or {other}")
    saved = folder / str(step)
    if resume and "progress" not in parts:
        raise ValueError(
            f"{saved} has parameters but no optimizer state; start a new run from them "
            "with --init-from"
        )
    progress = parts.get("progress", {"step": jnp.asarray(step), "opt_state": None})
    if (inside := progress["step"]) != step:
        raise ValueError(f"{saved} is of step {inside}; give it its name back")
    for damaged, fault in faults.items():
        renamed = folder / f"{damaged}.damaged"
        instead = f"set aside as {renamed.name}" if resume else "left out"
        log_line(f"{fault}; it is {instead}, and step {step} taken instead")
        if resume and is_first_process():
            shutil.rmtree(renamed, ignore_errors=True)  # the same step's, of before
            (folder / str(damaged)).rename(renamed)
    wait_for_all("restored")
    return TrainState(params=parts["params"], **progress)


def _restore(saved: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Those of the parts that were saved; raises _DamageError in every process."""
    with _same_outcome_everywhere(saved):
        record = read_record(saved)
    check_shapes(record["shapes"], shapes(parts["params"]), str(saved))
    handler, restored = ocp.StandardCheckpointHandler(), {}  # which waits for no other
    with _same_outcome_everywhere(saved):
        for name in [name for name in parts if name in record["parts"]]:
            restore_args, part = (
                ocp.args.StandardRestore(parts[name]),
                saved.absolute() / name,
            )
            restored[name] = handler.restore(part, args=restore_args)
    if "checksums" not in record:
        log_line(f"{saved} is of an older version, and was not checked for damage")
        return restored
    for name, number in checksums(restored).items():
        if number != record["checksums"].get(name):
            raise _DamageError(f"{saved} is damaged ({name} is not what was saved)")
    return restored


@contextmanager
def _same_outcome_everywhere(saved: Path) -> Iterator[None]:
    """Turns what fails in one process into a _DamageError in every one."""
    failed = None
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # which is not the files' fault
    except Exception as error:
        failed = error
    if any_failed(failed is not None):
        reason = str(failed or "another process can't read it")
        reason = reason.split(":")[0]  # where TensorStore goes on with its drivers
        raise _DamageError(f"{saved} is damaged ({reason})") from failed


def saved_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints, whole or not."""
    paths = folder.iterdir() if folder.exists() else ()  # an error if it is a file
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and p.is_dir())


def find_steps(folder: Path, which: str | int) -> list[int]:
    """The step of checkpoint "best", "latest" or a number, then those to try after it.

    The best begin with those whose metric can't be read, so that this is told. Raises
    ValueError that lists the steps there are.
    """
    if not (steps := saved_steps(folder)):
        raise FileNotFoundError(
            f"{folder} has no checkpoint yet; train for longer, or start again with "
            "--resume"
        )
    if which == "latest":
        return steps[::-1]
    if which == "best":
        return _best_first(_metrics(folder, steps, -math.inf))
    if str(which).isdecimal() and int(which) in steps:
        return [int(which)]
    listed = ", ".join(map(str, steps))
    raise ValueError(f"checkpoint {which!r} is not one of: best, latest, {listed}")


def best_metric(folder: Path) -> float | None:
    """The lowest validation metric of the checkpoints, None if none was evaluated."""
    best = min(_metrics(folder, saved_steps(folder), math.inf).values())
    return best if best < math.inf else None


def _metrics(folder: Path, steps: list[int], unreadable: float) -> dict[int, float]:
    metrics = dict.fromkeys(steps, unreadable)
    for step in steps:
        with suppress(ValueError):
            metrics[step] = read_record(folder / str(step))["figure"]
    return metrics


def _best_first(metrics: dict[int, float]) -> list[int]:
    return sorted(metrics, key=lambda step: (metrics[step], -step))
