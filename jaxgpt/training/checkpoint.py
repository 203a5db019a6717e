"""Checkpoints with Orbax: keeps the best and the latest two, saves in the background.

A checkpoint has two parts: `params`, which is all that generation reads, and
`progress`, which resuming needs too. Its record has a checksum of every array, and a
checkpoint whose restored arrays do not match, or are not finite, is never used.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxgpt.files import is_first_process, plain_path
from jaxgpt.parallel.processes import any_failed, several_processes, wait_for_all
from jaxgpt.start import release_memory
from jaxgpt.terminal import log_line
from jaxgpt.training.record import (
    check_shapes,
    checksums,
    make_record,
    non_finite_array,
    read_record,
    shapes,
)
from jaxgpt.training.step import TrainState

CHECKPOINTS = "checkpoints"
_DELETED = "deleted"  # checkpoints are moved there first, so that readers see no half
_READ_BACK_BYTES = 256 << 20  # a larger first checkpoint is read back only in part


_NO_MEMORY = (MemoryError, jax.errors.JaxRuntimeError)
_NOT_DAMAGE = (*_NO_MEMORY, PermissionError)


class _RestoreError(ValueError):
    """A checkpoint that can't be restored."""


class _DamageError(_RestoreError):
    """A checkpoint that is unreadable, or differs from what was saved."""


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """Opens the checkpoints in `folder` for saving; on exit, waits for pending saves.

    Creates the folder and deletes partial saves. Raises OSError if a save fails.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=_BestAndLatestTwo(folder),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # does not read metadata, which may be damaged
        todelete_subdir=_DELETED,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with plain_path(folder) as path:
        checkpoints = ocp.CheckpointManager(path, options=options)
        try:
            yield checkpoints
        finally:
            with _plain_save_errors():
                checkpoints.close()
            _empty_deleted(folder)


def _empty_deleted(folder: Path) -> None:
    if is_first_process():
        shutil.rmtree(folder / _DELETED, ignore_errors=True)


@dataclass(frozen=True)
class _BestAndLatestTwo(checkpoint_managers.PreservationPolicy):
    """Has Orbax keep the best and the latest two, as the last may turn out damaged."""

    folder: Path

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        *before, last = checkpoints
        metrics = _metrics(self.folder, [info.step for info in before], math.inf)
        metrics[last.step] = last.metrics["figure"]  # its record is not written yet
        kept = {_best_first(metrics)[0], *list(metrics)[-2:]}
        return [step in kept for step in metrics]


def save_state(
    checkpoints: ocp.CheckpointManager, state: TrainState, metric: float | None
) -> None:
    """Starts saving `state` in the background; returns once the arrays are copied.

    The first checkpoint of a folder is waited for and read back, so that a run that
    can't be restored ends here.

    Args:
      checkpoints: the manager from `open_checkpoints`.
      state: the training state; if its opt_state is None, only parameters are saved.
      metric: validation metric of these parameters, lower is better; None if they were
        not evaluated, in which case the checkpoint ranks behind all that were.

    Raises OSError if the previous save failed, or if the first can't be read back.
    """
    step, parts = int(state.step), _parts(state)
    is_first = not checkpoints.all_steps()
    args = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
    record = make_record(parts, math.inf if metric is None else metric)
    with _plain_save_errors():
        if not checkpoints.save(
            step,
            args=ocp.args.Composite(**args),
            metrics=record,  # only for the preservation policy
            custom_metadata=record,
        ):
            raise ValueError(f"there is already a checkpoint later than step {step}")
        if is_first:
            checkpoints.wait_until_finished()
    if is_first:
        _read_back(Path(checkpoints.directory).resolve() / str(step), parts)


def _read_back(saved: Path, parts: dict[str, Any]) -> None:
    """Raises OSError unless the checkpoint just saved can be restored."""
    abstract = _abstract(parts)
    is_large = sum(x.nbytes for x in jax.tree.leaves(parts)) > _READ_BACK_BYTES
    for wait in (0, 1, 4, 10):  # a network file system may be slow to show it
        time.sleep(wait)
        if saved.exists():
            break
    try:
        try:
            _restore(saved, abstract, only_one=is_large)
        except _RestoreError as error:
            if not isinstance(error.__cause__, _NO_MEMORY):
                raise
            _restore(saved, abstract, only_one=True)  # there is no room for a second
    except _RestoreError as error:
        raise OSError(
            f"the first checkpoint was saved, but can't be read back: {error}; train "
            "in another directory"
        ) from error


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of the arrays in a tree."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None)
        ),
        tree,
    )


def _only_smallest(tree: Any) -> Any:
    """Replaces all leaves by ocp.PLACEHOLDER, but the smallest that is no scalar."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
    kept = min(arrays, key=lambda leaf: leaf.size)
    return jax.tree.map(lambda leaf: leaf if leaf is kept else ocp.PLACEHOLDER, tree)


def _parts(state: TrainState) -> dict[str, Any]:
    if state.opt_state is None:
        return {"params": state.params}
    names = ("step", "opt_state", "skipped")
    progress = {name: getattr(state, name) for name in names}
    if state.extra is not None:
        progress["extra"] = state.extra
    return {"params": state.params, "progress": progress}


def check_saves(checkpoints: ocp.CheckpointManager, saved: int | None) -> int | None:
    """Returns the latest saved step; frees memory if a save has ended since `saved`.

    Does not wait for a running save. Raises OSError if a background save has failed.
    """
    with _plain_save_errors():
        if checkpoints.is_saving_in_progress():
            return saved
        checkpoints.wait_until_finished()  # raises the error of a failed save
    if (latest := checkpoints.latest_step()) != saved:
        _empty_deleted(Path(checkpoints.directory))
        release_memory()
    return latest


@contextmanager
def _plain_save_errors() -> Iterator[None]:
    """Turns the error of a failed save into an OSError that says what to do."""
    try:
        yield
    except Exception as error:
        lost = (RuntimeError, TimeoutError, AssertionError)
        if several_processes() and isinstance(error, lost):
            raise  # caused by another process, not by files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"a checkpoint could not be saved ({reason}); earlier ones are kept. If "
            "the disk is full, free some space, then continue with --resume"
        ) from error


def restore_state(
    folder: Path, which: str | int, abstract: TrainState, *, resume: bool = False
) -> TrainState:
    """Reads a checkpoint, sharded like `abstract`.

    If the "best" or "latest" checkpoint can't be restored for whatever reason, that is
    logged, and the next best or the previous one is used instead. If none was
    evaluated, the best is the latest. A checkpoint that a training run deletes in the
    meantime is not an error; the folder is looked at again.

    Args:
      folder: the directory of checkpoints.
      which: "best", "latest" or a step.
      abstract: shapes, dtypes and shardings. If its opt_state is None, only parameters
        are read. The returned opt_state is None if only parameters were saved.
      resume: requires an opt_state, and renames those that can't be restored, so
        that their steps can be saved again.

    Raises FileNotFoundError if there is no checkpoint, ValueError that lists the
    existing steps, the damage, or the first parameter whose shape differs, or the first
    error if it was not damage (such as PermissionError).
    """
    step, parts, faults = _restore_first(folder, which, abstract, resume)
    saved = folder / str(step)
    if resume and "progress" not in parts:
        raise ValueError(
            f"{saved} has parameters but no optimizer state; start a new run from them "
            "with --init-from"
        )
    progress = parts.get("progress", {"step": jnp.asarray(step), "opt_state": None})
    if (saved_step := progress["step"]) != step:
        raise ValueError(f"{saved} contains step {saved_step}; rename it to match")
    for damaged, fault in faults.items():
        kind = "damaged" if isinstance(fault, _DamageError) else "unreadable"
        renamed = folder / f"{damaged}.{kind}"
        action = f"renamed to {renamed.name}" if resume else "skipped"
        log_line(f"{fault}; it was {action}, and step {step} is used instead")
        if resume and is_first_process():
            shutil.rmtree(renamed, ignore_errors=True)  # an earlier one of this step
            (folder / str(damaged)).rename(renamed)
    wait_for_all("restored")
    return TrainState(params=parts["params"], **progress)


def best_parameters(
    checkpoints: ocp.CheckpointManager, last: TrainState
) -> tuple[int | None, Any]:
    """The step and the parameters of a run's best checkpoint, once all are saved.

    If that is the last, they are those of `last`, which may lack an opt_state. If none
    can be restored, that is logged, and both are None. Raises OSError if a save fails.
    """
    with _plain_save_errors():
        checkpoints.wait_until_finished()
    folder = Path(checkpoints.directory).resolve()
    try:
        step, saved = int(last.step), saved_steps(folder)
        is_best = bool(saved) and find_steps(folder, "best")[0] == step
        if not any_failed(not is_best):
            return step, last.params
        abstract = TrainState(last.step, _abstract(last.params), None)
        state = restore_state(folder, "best", abstract)
    except (OSError, ValueError, *_NO_MEMORY) as error:
        if several_processes() and isinstance(error, jax.errors.JaxRuntimeError):
            raise  # another process has ended
        log_line(f"the loss of the best checkpoint is unknown: {error}")
        return None, None
    return int(state.step), state.params


def _restore_first(
    folder: Path, which: str | int, abstract: TrainState, resume: bool
) -> tuple[int, dict[str, Any], dict[int, _RestoreError]]:
    """Restores the first checkpoint that can be; returns it, and why others can't."""
    faults: dict[int, _RestoreError] = {}
    for step in find_steps(folder, which):
        saved = folder / str(step)
        try:
            return step, _restore(saved, _parts(abstract)), faults
        except _RestoreError as error:
            if any_failed(not saved.exists()):  # a training run has deleted it
                return _restore_first(folder, which, abstract, resume)
            faults[step] = error
    for fault in faults.values():
        if isinstance(fault.__cause__, _NOT_DAMAGE):
            raise fault.__cause__
    advice = f"move {folder} away to start at step 0" if resume else "use another"
    advice = f"; restore one from a copy, or {advice}"
    damaged = any(isinstance(fault, _DamageError) for fault in faults.values())
    listed = "; ".join(map(str, faults.values()))
    raise ValueError(listed + (advice if damaged else ""))


def _restore(
    saved: Path, parts: dict[str, Any], *, only_one: bool = False
) -> dict[str, Any]:
    """Reads those of `parts` that exist; all processes raise _RestoreError together.

    With `only_one`, reads one small array of each part; the others are PLACEHOLDER.
    """
    with _same_outcome_everywhere(saved), plain_path(saved) as path:
        record = read_record(path)
    is_older = "checksums" not in record
    try:
        check_shapes(record["shapes"], shapes(parts["params"]), str(saved))
    except ValueError as error:
        raise _RestoreError(str(error)) from error
    handler, restored = ocp.PyTreeCheckpointHandler(), {}  # no process barriers
    with (
        _same_outcome_everywhere(saved, is_older=is_older),
        plain_path(saved) as path,
    ):
        for name in [name for name in parts if name in record["parts"]]:
            wanted = _only_smallest(parts[name]) if only_one else parts[name]
            restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
            args = ocp.args.PyTreeRestore(wanted, restore_args)
            restored[name] = handler.restore(path / name, args=args)
    if bad := non_finite_array(restored["params"]):
        raise _RestoreError(f"{saved} has parameters that are not finite ({bad})")
    if is_older:
        log_line(f"{saved} is from an older version; it was not checked for damage")
        return restored
    for name, number in checksums(restored).items():
        if number != record["checksums"].get(name):
            raise _DamageError(f"{saved} is damaged (checksum mismatch in {name})")
    return restored


@contextmanager
def _same_outcome_everywhere(saved: Path, *, is_older: bool = False) -> Iterator[None]:
    """Turns an error in any process into a _RestoreError in every process."""
    failed = None
    try:
        yield
    except Exception as error:
        failed = error
    if any_failed(failed is not None):
        reason = "another process can't read it" if failed is None else str(failed)
        reason = reason or type(failed).__name__
        if isinstance(failed, _NOT_DAMAGE):
            raise _RestoreError(f"{saved} can't be read ({reason})") from failed
        reason = reason.split(":")[0]  # without TensorStore's details of its drivers
        if is_older:
            raise _RestoreError(
                f"{saved} is from an older version, and this one can't read all of it "
                f"({reason}); `train.py --init-from` reads only the parameters"
            ) from failed
        raise _DamageError(f"{saved} is damaged ({reason})") from failed


def saved_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints, damaged or not."""
    paths = folder.iterdir() if folder.exists() else ()  # raises if it is a file
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and p.is_dir())


def digest(saved: Path) -> str:
    """The sha256 of a checkpoint's parameters, by the checksums in its record.

    The copy of a checkpoint has the same. Raises ValueError if the record is damaged,
    or from an older version, which has no checksums.
    """
    found = read_record(saved)
    if "checksums" not in found:
        raise ValueError(f"{saved} is from an older version, without checksums")
    numbers = {n: c for n, c in found["checksums"].items() if n.startswith("params.")}
    text = json.dumps([found["shapes"], numbers], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find_steps(folder: Path, which: str | int) -> list[int]:
    """The step of checkpoint "best", "latest" or a number, then the fallbacks in order.

    For "best", those with an unreadable metric come first, so that they are reported.
    Raises FileNotFoundError if there are none, ValueError that lists the steps.
    """
    if not (steps := saved_steps(folder)):
        raise FileNotFoundError(
            f"{folder} has no checkpoint yet; train for longer, or continue the run "
            "with --resume"
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
    """The lowest validation metric of all checkpoints; None if none was evaluated."""
    best = min(_metrics(folder, saved_steps(folder), math.inf).values())
    return best if best < math.inf else None


def _metrics(folder: Path, steps: list[int], unreadable: float) -> dict[int, float]:
    metrics = dict.fromkeys(steps, unreadable)
    for step in steps:
        with suppress(ValueError, OSError):
            metrics[step] = read_record(folder / str(step))["figure"]
    return metrics


def _best_first(metrics: dict[int, float]) -> list[int]:
    return sorted(metrics, key=lambda step: (metrics[step], -step))
