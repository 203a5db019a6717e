"""Hands the rows of metrics.jsonl on to TensorBoard and to Weights & Biases.

Each time a run starts, all rows it has kept are handed on before the new ones, so what
is shown follows from metrics.jsonl, also if a run was killed or began without a logger.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jaxgpt.config import Config
from jaxgpt.files import delete

Log = Callable[[dict[str, Any]], None]  # takes a row of metrics.jsonl
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}  # by logger and folder


def check_installed(log_to: Iterable[str]) -> None:
    """Raises ImportError that names the first package missing for `train.log_to`."""
    for name in log_to:
        if not find_spec(package := PACKAGES[name]):
            raise ImportError(
                f"--train.log-to {name} needs {package}; install it with "
                f"`pip install {package}`"
            )


def open_logger(
    name: str, run_dir: Path, config: Config, elapsed: float
) -> AbstractContextManager[Log]:
    """Opens a logger in its folder of the run directory.

    Args:
      name: "tensorboard" or "wandb".
      elapsed: `elapsed_seconds` of a row written now.
    """
    if name == "tensorboard":
        return _open_tensorboard(run_dir / name, time.time() - elapsed)
    return _open_wandb(run_dir / name, config)


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """A row's finite figures as "event/name"."""
    others = ("event", "step", "elapsed_seconds")
    return {
        f"{row['event']}/{name}": value
        for name, value in row.items()
        if name not in others and value is not None
    }


@contextmanager
def _open_tensorboard(folder: Path, started: float) -> Iterator[Log]:
    """Replaces the folder by one with a new file of events.

    Writes in the calling thread: if the disk is full, the writer with a thread of its
    own would wait forever.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    delete(folder)
    folder.mkdir()

    def log(row: dict[str, Any]) -> None:
        figures = _figures(row).items()
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures]
        at = {"step": row["step"], "wall_time": started + row["elapsed_seconds"]}
        writer.write_event(Event(**at, summary=Summary(value=values)))
        if row["event"] != "train":
            writer.flush()

    with closing(EventsWriter(str(folder / "events"))) as writer:
        # A TensorBoard that is open discards what it has read of the run.
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(step=0, wall_time=time.time(), session_log=start))
        yield log


@contextmanager
def _open_wandb(folder: Path, config: Config) -> Iterator[Log]:
    """Continues the run whose id is in the folder, or starts one.

    wandb can't delete rows, so those it has are not handed on again. A resumed run
    repeats them exactly, unless its settings were changed.
    """
    import wandb

    folder.mkdir(exist_ok=True)
    if not (path := folder / "id").exists():
        path.write_text(secrets.token_hex(4))
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxgpt"),
            name=folder.absolute().parent.name,
            id=path.read_text(),
            resume="allow",
            dir=folder.parent,
            config=config.to_dict(),
            settings=wandb.Settings(console="off"),
        )
    except wandb.Error as error:
        raise ValueError(
            f"--train.log-to wandb: {error}; run `wandb login`, or set "
            "WANDB_MODE=offline"
        ) from error
    first = run.step  # after those it has

    def log(row: dict[str, Any]) -> None:
        if row["step"] >= first:
            run.log(_figures(row), step=row["step"])

    with run:
        yield log
