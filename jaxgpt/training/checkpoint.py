"""Checkpoints through Orbax: the best and the latest of a run, saved in the background.

A checkpoint has two parts: `params`, which generation reads alone, and `progress`, the
step and the optimizer state that a resume needs besides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from orbax.checkpoint import checkpoint_managers

from jaxgpt.config import Config
from jaxgpt.processes import several_processes
from jaxgpt.training.step import TrainState, abstract_state

CHECKPOINTS = "checkpoints"


def open_checkpoints(folder: Path, create: bool = False) -> ocp.CheckpointManager:
    """The checkpoints in `folder`; use as a context, so that saves end before it does.

    Args:
      create: make the folder if need be, and clear it of saves that were cut off; else
        nothing on disk changes before the first save.
    """
    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(1),
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
        create=create,
        cleanup_tmp_directories=create,
    )
    handlers = {
        part: ocp.StandardCheckpointHandler() for part in ("params", "progress")
    }
    with _naming_damage(folder):
        return ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns what Orbax raises on damaged files into an error that names the path."""
    try:
        yield
    except Exception as error:
        lost = (RuntimeError, TimeoutError, AssertionError)
        if several_processes() and isinstance(error, lost):
            raise  # it tells of the other processes, not of the files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is damaged ({reason}); move it away to go on from another"
        ) from error


def save_state(
    checkpoints: ocp.CheckpointManager, state: TrainState, val_loss: float | None
) -> None:
    """Starts to save `state`; returns once the arrays are copied.

    Args:
      val_loss: of these very parameters; None if they were not evaluated, and the
        checkpoint then never counts as the best.
    """
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            progress=ocp.args.StandardSave(_progress(state)),
        ),
        metrics=None if val_loss is None else {"val_loss": val_loss},
    )


def save_params(checkpoints: ocp.CheckpointManager, step: int, params: Any) -> None:
    """Starts to save parameters that have no optimizer state, of another program's."""
    args = ocp.args.Composite(params=ocp.args.StandardSave(params))
    checkpoints.save(step, args=args)


def has_progress(checkpoints: ocp.CheckpointManager, step: int) -> bool:
    """Whether the checkpoint was saved with what a resume needs besides parameters."""
    with _naming_damage(checkpoints.directory / str(step)):
        parts = checkpoints.metadata(step).item_handlers
    return not parts or "progress" in parts


def restore_state(
    checkpoints: ocp.CheckpointManager,
    step: int,
    model: nn.Module,
    config: Config,
    mesh: Mesh,
) -> TrainState:
    """Reads the state saved at `step`, placed on the mesh.

    Raises ValueError if it has parameters only, or names the first of another shape
    than the config's.
    """
    abstract = abstract_state(model, config, mesh)
    _check_shapes(checkpoints, step, abstract.params)
    if not has_progress(checkpoints, step):
        raise ValueError(
            f"{checkpoints.directory / str(step)} has parameters but no optimizer "
            "state; start a new run from them with --init-from"
        )
    with _naming_damage(checkpoints.directory / str(step)):
        saved = checkpoints.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params),
                progress=ocp.args.StandardRestore(_progress(abstract)),
            ),
        )
        return TrainState(params=saved["params"], **saved["progress"])


def restore_params(checkpoints: ocp.CheckpointManager, step: int, abstract: Any) -> Any:
    """Reads the parameters saved at `step`, without the optimizer's state.

    Args:
      abstract: the parameters' shapes, dtypes and shardings.

    Raises ValueError that names the first parameter of another shape.
    """
    _check_shapes(checkpoints, step, abstract)
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
    with _naming_damage(checkpoints.directory / str(step)):
        return checkpoints.restore(step, args=args)["params"]


def find_step(checkpoints: ocp.CheckpointManager, which: str | int) -> int:
    """The step of checkpoint "best", "latest" or a number.

    Where no checkpoint was evaluated, the best is the latest. Raises ValueError that
    lists the steps there are.
    """
    steps = sorted(checkpoints.all_steps())
    if not steps:
        raise FileNotFoundError(
            f"{checkpoints.directory} has no checkpoint yet; train for longer, or "
            "start again with --resume"
        )
    if which == "latest":
        return steps[-1]
    if which == "best":
        with _naming_damage(Path(checkpoints.directory)):
            best = checkpoints.best_step()
        return steps[-1] if best is None else best
    if str(which).isdecimal() and int(which) in steps:
        return int(which)
    raise ValueError(
        f"checkpoint {which!r} is not one of: best, latest, "
        + ", ".join(map(str, steps))
    )


def _progress(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def _check_shapes(
    checkpoints: ocp.CheckpointManager, step: int, abstract_params: Any
) -> None:
    folder = checkpoints.directory / str(step)
    with _naming_damage(folder):
        metadata = checkpoints.item_metadata(step)["params"]
    check_shapes(metadata, abstract_params, str(folder))


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
                f"{expected.get(name, 'missing')} by config.json"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in leaves
    }
