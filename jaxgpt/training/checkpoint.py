"""Checkpoints through Orbax: the best and the latest two, saved in the background.

A checkpoint has two parts: `params`, which generation reads alone, and `progress`, what
a resume needs besides. `digests.json` in it has the size and the SHA-256 of every file
of both; without it, or where a file differs, nothing of the checkpoint is used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from jaxgpt.config import Config
from jaxgpt.files import is_first_process, log_line
from jaxgpt.parallel.processes import (
    any_failed,
    process_share,
    several_processes,
    wait_for_all,
)
from jaxgpt.start import give_back_memory
from jaxgpt.training.step import TrainState, abstract_state

CHECKPOINTS = "checkpoints"
_DIGESTS = "digests.json"
_METRICS = "metrics"
_DAMAGED = ".damaged"  # suffix of what `newest_whole` sets aside
ALL_PARTS = ("params", "progress", _METRICS)
_TO_READ = ("params", _METRICS)
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")  # by Orbax, of no use


@contextmanager
def open_checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in `folder`, to add to; leaves once all are saved.

    Makes the folder if need be, and clears it of saves that were cut off. Raises
    OSError if a save fails.
    """
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(2),  # should the last turn out damaged
            checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: -metrics["val_loss"],
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy,
        best_fn=lambda metrics: metrics["val_loss"],
        best_mode="min",
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
            post_finalization_callback=partial(_write_digests, folder)
        ),
    )
    checkpoints = _manager(folder, options)
    try:
        yield checkpoints
    finally:
        with _telling_of_room():
            checkpoints.close()


def _read_only(folder: Path) -> ocp.CheckpointManager:
    return _manager(folder, ocp.CheckpointManagerOptions(create=False))


def _manager(
    folder: Path, options: ocp.CheckpointManagerOptions
) -> ocp.CheckpointManager:
    handlers = {
        part: ocp.StandardCheckpointHandler() for part in ("params", "progress")
    }
    with _naming_damage(folder):
        return ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )


def _write_digests(folder: Path) -> None:
    """Completes the checkpoint that is being saved, before it gets its name."""
    for saved in folder.glob("*.orbax-checkpoint-tmp*"):
        paths = sorted(
            path
            for path in saved.rglob("*")
            if path.is_file() and path.name not in _WRITTEN_LAST
        )
        names = [path.relative_to(saved).as_posix() for path in paths]
        sizes = [path.stat().st_size for path in paths]
        digests = zip(sizes, _sha256s(paths), strict=True)
        content = json.dumps(dict(zip(names, digests, strict=True)), indent=0)
        (saved / _DIGESTS).write_text(content, encoding="utf-8")


def _sha256s(paths: list[Path]) -> Iterator[str]:
    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(sha256, paths)


def _check(saved: Path, parts: tuple[str, ...]) -> None:
    """Raises ValueError if a file of the checkpoint is not what was saved.

    All files must be there; of those in `parts` every byte is read. Several processes
    share the reading, and all raise if one does.
    """
    fault = _fault(saved, parts, process_share)
    if any_failed(bool(fault)):
        raise ValueError(f"{saved} is damaged: {fault or 'another process has found'}")


def _fault(
    saved: Path,
    parts: tuple[str, ...],
    own: Callable[[list[str]], list[str]] = lambda names: names,
) -> str:
    """What is wrong with the checkpoint, or "".

    Of the files in `parts` every byte is read, of those that `own` picks.
    """
    path = saved / _DIGESTS
    if not path.is_file():
        return f"it has no {_DIGESTS}, as each has that was saved whole"
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        if "params/_METADATA" not in expected:
            return f"{_DIGESTS} is not as it was written"
        for name, (size, _) in expected.items():
            if not (saved / name).is_file():
                return f"{name} is missing"
            if (found := (saved / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, not {size:,}"
        names = own([name for name in expected if name.split("/")[0] in parts])
        digests = _sha256s([saved / name for name in names])
        for name, digest in zip(names, digests, strict=True):
            if digest != expected[name][1]:
                return f"{name} is not what was saved, its SHA-256 differs"
    except (ValueError, TypeError, AttributeError):
        return f"{_DIGESTS} is not as it was written"
    return ""


def _steps(folder: Path) -> list[int]:
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def newest_whole(folder: Path) -> int | None:
    """The step to resume from, None without a checkpoint; damaged ones are set aside.

    Every byte of the newest is read, and if it is damaged of the one before, and so on.
    Of those older than the newest whole one, which are read again if they are used, the
    files and the losses are looked at. Raises ValueError that lists all if none is
    whole.
    """
    steps, faults, whole = _steps(folder) if folder.is_dir() else [], {}, None
    for step in reversed(steps):
        try:
            _check(folder / str(step), ALL_PARTS if whole is None else (_METRICS,))
            whole = step if whole is None else whole
        except ValueError as error:
            faults[step] = str(error)
    if steps and whole is None:
        raise ValueError(
            f"none of the checkpoints is whole: {'; '.join(faults.values())}. Bring "
            f"one back from a copy, or move {folder} away to begin at step 0"
        )
    for step, fault in faults.items():
        log_line(f"{fault}; it is set aside as {step}{_DAMAGED}")
        if is_first_process():
            aside = folder / f"{step}{_DAMAGED}"
            shutil.rmtree(aside, ignore_errors=True)  # the same step's, of before
            (folder / str(step)).rename(aside)
    wait_for_all("set aside")
    return whole


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns what Orbax raises on damaged files into an error that names the path."""
    try:
        yield
    except Exception as error:
        if _tells_of_others(error):
            raise
        raise ValueError(
            f"{path} is damaged ({_reason(error)}); move it away to go on from another"
        ) from error


@contextmanager
def _telling_of_room() -> Iterator[None]:
    """Turns what a failed save raises into an error that says what to do."""
    try:
        yield
    except Exception as error:
        if _tells_of_others(error):
            raise
        raise OSError(
            f"a checkpoint could not be saved ({_reason(error)}); those from before "
            "are kept. Make room, if that is it, and go on with --resume"
        ) from error


def _tells_of_others(error: Exception) -> bool:
    """Whether the error is of the run's other processes, and not of files."""
    lost = (RuntimeError, TimeoutError, AssertionError)
    return several_processes() and isinstance(error, lost)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_state(
    checkpoints: ocp.CheckpointManager, state: TrainState, val_loss: float | None
) -> None:
    """Starts to save `state`; returns once the arrays are copied.

    Args:
      checkpoints: as `open_checkpoints` gives them.
      state: of training.
      val_loss: of these very parameters; None if they were not evaluated, and the
        checkpoint then never counts as the best.

    Raises OSError if the save before has failed.
    """
    metrics = None if val_loss is None else {"val_loss": val_loss}
    parts = {"params": state.params, "progress": _progress(state)}
    _save(checkpoints, int(state.step), parts, metrics)


def save_params(checkpoints: ocp.CheckpointManager, step: int, params: Any) -> None:
    """Starts to save parameters that have no optimizer state, of another program's."""
    _save(checkpoints, step, {"params": params})


def _save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    parts: dict[str, Any],
    metrics: dict[str, float] | None = None,
) -> None:
    args = {name: ocp.args.StandardSave(tree) for name, tree in parts.items()}
    with _telling_of_room():
        saves = checkpoints.save(step, args=ocp.args.Composite(**args), metrics=metrics)
        if not saves:
            raise ValueError(f"there is a checkpoint of a step after {step}")


def check_saves(checkpoints: ocp.CheckpointManager, saved: int | None) -> int | None:
    """The newest step that is saved; gives back a save's memory if it is not `saved`.

    Raises OSError if a save in the background has failed; waits for none.
    """
    with _telling_of_room():
        if checkpoints.is_saving_in_progress():
            return saved
        checkpoints.wait_until_finished()  # raises what the save has left
    newest = checkpoints.latest_step()
    if newest != saved:
        give_back_memory()
    return newest


def has_progress(folder: Path, step: int) -> bool:
    """Whether the checkpoint was saved with what a resume needs besides parameters."""
    return (folder / str(step) / "progress").is_dir()


def restore_state(
    folder: Path, step: int, model: nn.Module, config: Config, mesh: Mesh
) -> TrainState:
    """Reads the state saved at `step`, placed on the mesh.

    Raises ValueError if it has parameters only, or names the first of another shape
    than the config's.
    """
    if not has_progress(folder, step):
        raise ValueError(
            f"{folder / str(step)} has parameters but no optimizer state; start a new "
            "run from them with --init-from"
        )
    abstract = abstract_state(model, config, mesh)
    parts = {"params": abstract.params, "progress": _progress(abstract)}
    saved = _restore(folder, step, parts)
    state = TrainState(params=saved["params"], **saved["progress"])
    if state.step != step:
        raise ValueError(
            f"{folder / str(step)} is of step {state.step}; give it its name back"
        )
    return state


def restore_params(folder: Path, step: int, abstract: Any) -> Any:
    """Reads the parameters saved at `step`, without the optimizer's state.

    Args:
      folder: of the checkpoints.
      step: one that `find_step` has found whole.
      abstract: the parameters' shapes, dtypes and shardings.

    Raises ValueError that names the first parameter of another shape.
    """
    return _restore(folder, step, {"params": abstract})["params"]


def _restore(folder: Path, step: int, parts: dict[str, Any]) -> Any:
    saved = folder / str(step)
    with _read_only(folder) as checkpoints:
        with _naming_damage(saved):
            metadata = checkpoints.item_metadata(step)["params"]
        check_shapes(metadata, parts["params"], str(saved))
        asked = {
            name: ocp.args.StandardRestore(abstract) for name, abstract in parts.items()
        }
        with _naming_damage(saved):
            return checkpoints.restore(step, args=ocp.args.Composite(**asked))


def find_step(folder: Path, which: str | int, parts: tuple[str, ...] = _TO_READ) -> int:
    """The step of checkpoint "best", "latest" or a number.

    A damaged one is told of, and instead of the best or the latest the next best, or
    the one before, is taken. Where no checkpoint was evaluated, the best is the latest.

    Args:
      folder: of the checkpoints.
      which: as on the command line.
      parts: those of which every byte is checked.

    Raises ValueError that lists the steps there are, or what is wrong with those tried.
    """
    steps, faults = _steps(folder), []
    if not steps:
        raise FileNotFoundError(
            f"{folder} has no checkpoint yet; train for longer, or start again with "
            "--resume"
        )
    if which == "latest":
        tried = steps[::-1]
    elif which == "best":
        tried = sorted(steps, key=lambda step: (_rank(folder, step), -step))
    elif str(which).isdecimal() and int(which) in steps:
        tried = [int(which)]
    else:
        raise ValueError(
            f"checkpoint {which!r} is not one of: best, latest, "
            + ", ".join(map(str, steps))
        )
    for step in tried:
        try:
            _check(folder / str(step), parts)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log_line(f"{fault}; step {step} is taken instead")
        return step
    raise ValueError(f"{'; '.join(faults)}; bring it back from a copy")


def _rank(folder: Path, step: int) -> float:
    """Orders checkpoints from the best on, after those that hide their loss."""
    if _fault(folder / str(step), (_METRICS,)):
        return float("-inf")
    loss = val_loss(folder, step)
    return float("inf") if loss is None else loss


def val_loss(folder: Path, step: int) -> float | None:
    """The validation loss that a checkpoint was saved with, if any, and if whole."""
    path = folder / str(step) / _METRICS / _METRICS
    if not path.is_file() or _fault(folder / str(step), (_METRICS,)):
        return None
    return json.loads(path.read_text(encoding="utf-8"))["val_loss"]


def _progress(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
    }


def check_shapes(params: Any, abstract_params: Any, checkpoint: str) -> None:
    """Raises ValueError that names the first parameter of another shape.

    Args:
      params: arrays, or what tells their shapes.
      abstract_params: what the config makes of them.
      checkpoint: name of where they come from.
    """
    found, expected = _shapes(params), _shapes(abstract_params)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"checkpoint {checkpoint} is of another config: "
                f"{name} is {found.get(name, 'missing')} there, "
                f"{expected.get(name, 'missing')} by config.json; bring that run's own "
                "config.json back"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }
