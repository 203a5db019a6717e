"""The run directory: what is where in it, and how to read a run back.

config.json   tokenizer.json   checkpoints/STEP/   metrics.jsonl   lock
loss.png   attention.png   profile/
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import Mesh

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing keeps a second training out
    fcntl = None  # type: ignore[assignment]

from jaxgpt.config import Config, DataConfig
from jaxgpt.files import TMP_SUFFIX, is_first_process, replace_file
from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import host_mesh, single_device_mesh, with_shardings
from jaxgpt.parallel.processes import any_failed, max_over_processes, wait_for_all
from jaxgpt.text.tokenizer import Tokenizer, fits, load_tokenizer
from jaxgpt.training.checkpoint import (
    CHECKPOINTS,
    best_metric,
    find_steps,
    restore_state,
)
from jaxgpt.training.monitor import CURVE, METRICS
from jaxgpt.training.record import check_shapes, shapes
from jaxgpt.training.step import TrainState, abstract_state

FORMAT = 2  # of the directory, in config.json; what has none is of 1, and is read too
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
LOCK = "lock"
ATTENTION = "attention.png"
PROFILE = "profile"
# All of a run but the lock, blowup/ once; the config makes it one, and is deleted last.
_RUN_FILES = (
    CHECKPOINTS,
    "blowup",
    PROFILE,
    TOKENIZER,
    METRICS,
    CURVE,
    ATTENTION,
    CONFIG,
)


@dataclass(frozen=True)
class Run:
    """A trained model: `model.apply({"params": params}, tokens_BT)` gives logits.

    Attributes:
      tokenizer: None if the run was trained on tokens without a vocabulary.
      step: completed updates of these parameters.
    """

    config: Config
    tokenizer: Tokenizer | None
    model: nn.Module
    params: Any
    step: int


def load_run(
    run_dir: str | Path, checkpoint: str | int = "best", mesh: Mesh | None = None
) -> Run:
    """Reads a run back from its directory.

    Args:
      run_dir: as `train.py --out-dir` wrote it.
      checkpoint: "best" (lowest validation loss), "latest" or a step.
      mesh: of the devices that share the parameters; the first has all if left out.

    Raises OSError or ValueError that says what is missing or does not fit.
    """
    run_dir = Path(run_dir)
    config, tokenizer = load_config(run_dir), saved_tokenizer(run_dir)
    if tokenizer and not fits(tokenizer, config.model.vocab_size):
        raise ValueError(
            f"{run_dir / TOKENIZER} has {tokenizer.vocab_size} tokens, the model "
            f"{config.model.vocab_size}; is it another run's?"
        )
    mesh = mesh or single_device_mesh()
    model = build_model(config.model, platform_of(mesh))
    params = with_shardings(parameter_shapes(config.model), mesh)
    abstract = TrainState(jnp.array(0), params, None)
    state = restore_state(run_dir / CHECKPOINTS, checkpoint, abstract)
    return Run(config, tokenizer, model, state.params, int(state.step))


def load_initial_params(config: Config, mesh: Mesh) -> Any:
    """The parameters that `train.init_from` names, cropped to block_size, or None.

    They are placed on the mesh. Raises ValueError that names the first of another shape
    than the config's.
    """
    if not config.train.init_from:
        return None
    checkpoint = Path(config.train.init_from)
    run = load_run(checkpoint.parent.parent, checkpoint.name, mesh)
    params = crop_block_size(run.params, config.model.block_size)
    check_shapes(
        shapes(params), shapes(parameter_shapes(config.model)), str(checkpoint)
    )
    return params


def crop_block_size(params: Any, block_size: int) -> Any:
    """The parameters with the first `block_size` position embeddings only.

    Source: nanoGPT model.py, crop_block_size.
    """
    tables = {"wpe", "position_embedding"} & params.keys()
    return dict(params) | {
        name: {"embedding": params[name]["embedding"][:block_size]} for name in tables
    }


def saved_tokenizer(run_dir: Path) -> Tokenizer | None:
    """The run's own tokenizer, or None; raises ValueError if it is damaged."""
    path = run_dir / TOKENIZER
    return load_tokenizer(path) if path.exists() else None


def resumed_tokenizer(run_dir: Path, config: Config) -> Tokenizer | None:
    """The tokenizer of a run that goes on; None if its text is still to tell it.

    Raises ValueError if that would tell it wrong, for a run imported without corpus.
    """
    tokenizer = saved_tokenizer(run_dir)
    if not tokenizer and not config.data.sha256:
        check_has_tokenizer(run_dir, config.data)
    return tokenizer


def check_has_tokenizer(run_dir: Path, data: DataConfig) -> None:
    """Raises ValueError if a model without a tokenizer would get one by chance."""
    if data.tokenizer == "char" and not data.has_tokens:
        raise ValueError(
            f"{run_dir} has no tokenizer, so its model can't read text; give the "
            "--data.tokenizer it was trained with, or import it with --tokenizer or "
            "--meta"
        )


def text_tokenizer(run: Run) -> Tokenizer:
    """The run's tokenizer; raises ValueError that says how to supply one."""
    if run.tokenizer is None:
        raise ValueError(
            "the run has no tokenizer.json, and can't read or write text; import it "
            "again with --tokenizer or --meta, or, if it was trained here, give it one "
            "with `python train.py --resume`, --data.tokenizer and its --out-dir"
        )
    return run.tokenizer


def load_state(
    run_dir: Path, checkpoint: str | int = "best"
) -> tuple[Config, TrainState, float | None]:
    """Reads the config, the state of a checkpoint, and the best validation loss if any.

    The state's opt_state is None where only parameters were imported. Raises as
    `load_run` does.
    """
    config, mesh, folder = load_config(run_dir), host_mesh(), run_dir / CHECKPOINTS
    model = build_model(config.model, platform_of(mesh))
    state = restore_state(folder, checkpoint, abstract_state(model, config, mesh))
    return config, state, best_metric(folder)


def find_checkpoint(run_dir: Path, which: str | int) -> Path:
    """The absolute folder of a run's checkpoint: "best", "latest" or a step.

    Loading tells if it is damaged. Raises OSError or ValueError if there is none.
    """
    load_config(run_dir)
    folder = run_dir.resolve() / CHECKPOINTS
    return folder / str(find_steps(folder, which)[0])


def has_run(run_dir: Path) -> bool:
    """Whether the directory holds a run, finished or not."""
    return (run_dir / CONFIG).exists()


@contextmanager
def claim_run(run_dir: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Makes the directory if need be, and keeps other trainings out of it.

    Of several processes the first claims it for all. Raises FileExistsError if it holds
    a run that is neither to be resumed nor to be overwritten, files that are not a
    run's, or a training that is going on.
    """
    token = 0
    with ExitStack() as held:
        try:
            if is_first_process():
                lock = held.enter_context(_claim(run_dir, resume or overwrite))
                token = secrets.randbelow(2**31 - 1) + 1
                print(token, end="", file=lock, flush=True)
                os.fsync(lock.fileno())
        finally:
            token = int(max_over_processes(token))
        if not token:
            raise FileExistsError(f"process 0 could not claim {run_dir}, and says why")
        _check_shared(run_dir, token)
        yield


def _check_shared(run_dir: Path, token: int) -> None:
    """Raises FileNotFoundError unless all processes see the same run directory."""
    lock = run_dir / LOCK
    for wait in (0, 1, 4, 10):  # a network's file system may take its time
        time.sleep(wait)
        if seen := lock.exists() and lock.read_text(encoding="utf-8") == str(token):
            break
    if any_failed(not seen):
        raise FileNotFoundError(
            f"{run_dir} is not the same directory for all processes; give an --out-dir "
            "on a file system that they share"
        )


def _claim(run_dir: Path, may_hold_one: bool) -> IO[str]:
    """The lock of the run directory, held until it is closed."""
    if run_dir.is_file():
        raise FileExistsError(f"{run_dir} is a file; choose another directory")
    found = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    ours = {LOCK, CHECKPOINTS} & found  # others have a config.json too
    expected = {LOCK, *_RUN_FILES} if ours else set()
    if ours and {CONFIG, CHECKPOINTS} & found:
        if not may_hold_one:
            raise FileExistsError(
                f"{run_dir} already holds a run; go on with `train.py --resume`, "
                "replace it with --overwrite, or choose another directory"
            )
    elif foreign := {n for n in found - expected if not n.endswith(TMP_SUFFIX)}:
        raise FileExistsError(
            f"{run_dir} is not a run, it has {min(foreign)}; choose another directory"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / LOCK).open("w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FileExistsError(
            f"another training is going on in {run_dir}; wait for it to end, or "
            "choose another directory"
        ) from None
    for name in _RUN_FILES:  # what a killed training was writing
        for tmp_path in run_dir.glob(f"{name}.*{TMP_SUFFIX}"):
            tmp_path.unlink()
    return lock


def clear_run(run_dir: Path) -> None:
    """Deletes the run's own files, the config last; others stay as they are."""
    if is_first_process():
        for path in (run_dir / name for name in _RUN_FILES):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    wait_for_all("clear")


def save_config(run_dir: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Writes config.json and tokenizer.json, the config last: it makes the run one."""
    text = json.dumps({"format": FORMAT} | config.to_dict(), indent=2) + "\n"
    if is_first_process():
        if tokenizer:
            replace_file(run_dir / TOKENIZER, tokenizer.save)
        replace_file(run_dir / CONFIG, lambda path: path.write_text(text, "utf-8"))


def load_config(run_dir: Path) -> Config:
    """Reads config.json; raises OSError or ValueError that names the file."""
    path = run_dir / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{run_dir} is not a run: it has no {CONFIG}; runs are made by "
            "`python train.py --out-dir DIR` and `python -m jaxgpt import`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        newer = isinstance(values, dict) and values.pop("format", 1) > FORMAT
        if not newer:
            return Config.from_dict(values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a config of jaxgpt: {error}; mend it, or bring it back "
            "from a copy"
        ) from error
    raise ValueError(f"{run_dir} was made by a newer jaxgpt; update this one")
