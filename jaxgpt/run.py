"""The run directory: its files, and how to load a run.

config.json   tokenizer.json   checkpoints/STEP/   metrics.jsonl   lock
loss.png   reward.png   attention.png   confusion.png   profile/   tensorboard/   wandb/
"""

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

try:
    import fcntl
except ImportError:  # Windows has no flock, so run directories are not locked
    fcntl = None  # type: ignore[assignment]

from jaxgpt.config import POST_TRAINING, Config, DataConfig
from jaxgpt.files import (
    TMP_SUFFIX,
    delete,
    is_first_process,
    replace_file,
    temporary,
)
from jaxgpt.models import build_model, parameter_shapes
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.mesh import host_mesh, single_device_mesh, with_shardings
from jaxgpt.parallel.processes import any_failed, max_over_processes, wait_for_all
from jaxgpt.terminal import log_line
from jaxgpt.text.conversations import CHAT_TOKENS, is_chat_tokenizer
from jaxgpt.text.tasks import kind_of
from jaxgpt.text.tokenizer import Tokenizer, fits, load_tokenizer
from jaxgpt.training.checkpoint import (
    CHECKPOINTS,
    best_metric,
    digest,
    find_steps,
    restore_state,
)
from jaxgpt.training.loggers import PACKAGES
from jaxgpt.training.monitor import CURVE, METRICS, REWARDS
from jaxgpt.training.record import check_shapes, shapes
from jaxgpt.training.step import TrainState, abstract_state

FORMAT = 2  # of run directories, in config.json; 1 if absent, which can still be read
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
LOCK = "lock"
ATTENTION = "attention.png"
CONFUSION = "confusion.png"
PROFILE = "profile"
# What a model of each task is called, what it can do, and which command is for it.
_TASKS = {
    "next-token": ("language model", "continue text", "generate.py"),
    "classification": (
        "classifier",
        "classify text",
        "`python -m jaxgpt classify`",
    ),
    "masked-tokens": (
        "masked language model",
        "predict masked tokens",
        "`python -m jaxgpt evaluate`, or fine-tune it with `train.py --init-from`",
    ),
    "reward": (
        "reward model",
        "score text",
        "`generate.py --reward-model` or `train.py ppo --reward-model`",
    ),
    "translation": (
        "sequence-to-sequence model",
        "translate",
        "`python -m jaxgpt translate`",
    ),
}
# A run's files except lock (blowup/ is of older versions); config.json is deleted last.
_RUN_FILES = (
    *(CHECKPOINTS, "blowup", PROFILE, TOKENIZER, METRICS, CURVE, ATTENTION, CONFUSION),
    REWARDS,
    *PACKAGES,
    CONFIG,
)


@dataclass(frozen=True)
class Run:
    """A trained model: `model.apply({"params": params}, tokens_BT)` gives logits.

    Attributes:
      tokenizer: None if unknown, as for token files without a vocabulary.
      step: number of updates that led to these parameters.
    """

    config: Config
    tokenizer: Tokenizer | None
    model: nn.Module
    params: Any = field(repr=False)  # thousands of numbers
    step: int


def load_run(
    run_dir: str | Path, checkpoint: str | int = "best", mesh: Mesh | None = None
) -> Run:
    """Loads a run from its directory.

    Args:
      run_dir: directory written by `train.py --out-dir`.
      checkpoint: "best" (lowest validation loss), "latest" or a step.
      mesh: devices to shard the parameters over; by default only the first.

    Raises OSError or ValueError if a file is missing or does not match the config.
    """
    run_dir = Path(run_dir)
    config, tokenizer = load_config(run_dir), saved_tokenizer(run_dir)
    if tokenizer and not fits(tokenizer, config.model.vocab_size):
        raise ValueError(
            f"{run_dir / TOKENIZER} has {tokenizer.vocab_size} tokens, but the model "
            f"has {config.model.vocab_size}; is it from another run?"
        )
    mesh = mesh or single_device_mesh()
    model = build_model(config.model, platform_of(mesh))
    params = with_shardings(parameter_shapes(config.model), mesh)
    abstract = TrainState(jnp.array(0), params, None)
    state = restore_state(run_dir / CHECKPOINTS, checkpoint, abstract)
    return Run(config, tokenizer, model, state.params, int(state.step))


def load_initial_params(config: Config, mesh: Mesh) -> Any:
    """Loads the parameters of `train.init_from`, cropped to block_size; None if unset.

    With conversations, the vocabulary grows by their tokens. A classifier of other
    labels, or a masked language model, gives all but the head of a new classifier; a
    line says so. They are sharded over the mesh. Raises ValueError that names the first
    parameter whose shape does not match the config.
    """
    if not config.train.init_from:
        return None
    checkpoint = Path(config.train.init_from)
    run = load_run(checkpoint.parent.parent, checkpoint.name, mesh)
    if kind_of(config) == "conversations":
        run = with_chat_tokens(run)
    params = crop_block_size(run.params, config.model.block_size)
    expected = parameter_shapes(config.model)
    labels = [getattr(each, "labels", ()) for each in (run.config.model, config.model)]
    if labels[0] != labels[1]:
        expected = {name: expected[name] for name in expected if name != "classifier"}
        unused = ", ".join(sorted(params.keys() - expected.keys()))
        log_line(f"the classifier is new; {unused} of {checkpoint} is not used")
        params = {name: params[name] for name in params if name in expected}
    if config.model.task == "reward" and run.config.model.task != "reward":
        expected = {name: expected[name] for name in expected if name != "reward"}
    check_shapes(shapes(params), shapes(expected), str(checkpoint))
    return params


def with_reference(config: Config) -> Config:
    """The config of PPO, GRPO or DPO with the digest of its reference, else as it is.

    Raises ValueError if there is no reference, or if it has changed since the run
    began; OSError if it can't be read.
    """
    names = [name for name in POST_TRAINING if getattr(config, name)]
    if not names:
        return config
    (name,) = names
    section: Any = getattr(config, name)
    if not (reference := config.train.init_from):
        raise ValueError(
            f"{name} starts from a run, which is its reference; give --init-from DIR"
        )
    found = digest(Path(reference))
    if section.reference_sha256 not in ("", found):
        raise ValueError(
            f"the reference has changed since the run began: {reference} has sha256 "
            f"{found}, not {section.reference_sha256}; restore it, or train a new run"
        )
    changed: dict[str, Any] = {name: replace(section, reference_sha256=found)}
    return replace(config, **changed)


def with_chat_tokens(run: Run) -> Run:
    """The run with the special tokens of conversations; new ones begin as the mean row.

    A line says so if there are any.
    """
    before = text_tokenizer(run)
    if is_chat_tokenizer(before):
        return run
    tokenizer = before.with_special(CHAT_TOKENS)
    known, size = before.vocab_size, tokenizer.vocab_size
    if known == size:  # it had them, but not as special ones
        return replace(run, tokenizer=tokenizer)
    log_line(f"{size - known} new tokens begin as the mean row of the embedding")
    model = run.config.model
    model = replace(model, vocab_size=max(model.require_vocab_size(), size))
    return replace(
        run,
        config=replace(run.config, model=model),
        tokenizer=tokenizer,
        model=run.model.clone(config=model),
        params=grow_vocabulary(run.params, known, size),
    )


def grow_vocabulary(params: Any, known: int, size: int) -> Any:
    """Returns the parameters with rows of new tokens, each the mean of the known rows.

    Args:
      known: number of tokens that were trained; rows beyond them are spare.
      size: number of tokens with the new ones.
    """

    def grow(table_VC: jax.Array) -> jax.Array:
        missing = max(0, size - len(table_VC))
        grown_VC = jnp.pad(table_VC, ((0, missing), (0, 0)))
        return grown_VC.at[known:size].set(table_VC[:known].mean(axis=0))

    table_VC = params["wte"]["embedding"]
    grown_VC = jax.jit(grow, out_shardings=table_VC.sharding)(table_VC)
    return {**params, "wte": {"embedding": grown_VC}}


def crop_block_size(params: Any, block_size: int) -> Any:
    """Returns the parameters with only the first `block_size` position embeddings.

    Source: nanoGPT model.py, crop_block_size.
    """
    cropped = {
        name: {"embedding": params[name]["embedding"][:block_size]}
        for name in {"wpe", "position_embedding"} & params.keys()
    }
    if "encoder" in params:
        cropped["encoder"] = crop_block_size(params["encoder"], block_size)
    return dict(params) | cropped


def saved_tokenizer(run_dir: Path) -> Tokenizer | None:
    """Returns the run's tokenizer, or None; raises ValueError if it is damaged."""
    try:
        return load_tokenizer(run_dir / TOKENIZER)
    except FileNotFoundError:
        return None


def resumed_tokenizer(run_dir: Path, config: Config) -> Tokenizer | None:
    """Returns the tokenizer of a resumed run; None if `load_corpus` must find it.

    Raises ValueError if an imported run has none and would get a character tokenizer
    from new text.
    """
    tokenizer = saved_tokenizer(run_dir)
    if not tokenizer and not config.data.sha256:
        check_has_tokenizer(run_dir, config.data)
    return tokenizer


def check_has_tokenizer(run_dir: Path, data: DataConfig) -> None:
    """Raises ValueError if the run would get a character tokenizer from new text."""
    if data.tokenizer == "char" and not data.has_tokens:
        raise ValueError(
            f"{run_dir} has no tokenizer, so its model can't read text; give the "
            "--data.tokenizer it was trained with, or run `python -m jaxgpt import` "
            "again with --tokenizer or --meta"
        )


def require_task(config: Config, task: str) -> Any:
    """Returns the model's config if the model is for the task.

    Raises ValueError that says what else the run is for.
    """
    model = config.model
    if model.task != task:
        kind, _, instead = _TASKS[model.task]
        raise ValueError(
            f"the run is a {kind} (architecture={model.architecture}), which can't "
            f"{_TASKS[task][1]}; use {instead}"
        )
    return model


def check_call(run: Any, texts: Any = (), **integers: Any) -> list[str]:
    """Checks the types of a public function's arguments; returns the texts as a list.

    Raises TypeError unless `run` is a `Run`, the texts are strings, and the others int.
    """
    if not isinstance(run, Run):
        raise TypeError(f"run={run!r} must be the result of load_run")
    iterable = hasattr(texts, "__iter__") and not isinstance(texts, str)
    listed: list[Any] = [*texts] if iterable else [None]
    if not all(isinstance(text, str) for text in listed):
        raise TypeError(f"texts={texts!r:.80} must be a list of str")
    for name, number in integers.items():
        if not hasattr(number, "__index__"):
            raise TypeError(f"{name}={number!r} must be int")
    return listed


def text_tokenizer(run: Run) -> Tokenizer:
    """Returns the run's tokenizer; raises ValueError if it has none."""
    if run.tokenizer is None:
        raise ValueError(
            "the run has no tokenizer.json, so it can't read or write text; import it "
            "again with --tokenizer or --meta or, if it was trained here, add one with "
            "`python train.py --out-dir DIR --resume --data.tokenizer NAME`"
        )
    return run.tokenizer


def prompt_tokens(run: Run, prompt: str) -> tuple[str, np.ndarray]:
    """The prompt that the text continues, and its token ids, i32, at least one.

    An empty prompt becomes the tokenizer's `start`. If the run has packing=documents or
    conversations, it stays empty: the end-of-text token comes before every prompt, as
    in training. Special tokens in a prompt are tokens.

    Raises ValueError if a character is unknown, or if the run has no tokenizer.
    """
    tokenizer = text_tokenizer(run)
    if run.config.data.packing == "windows":
        prompt = prompt or tokenizer.start
        return prompt, tokenizer.encode_prompt(prompt)
    ids, end = tokenizer.encode_prompt(prompt), tokenizer.end_of_text
    return prompt, ids if end in ids[:1] else np.array([end, *ids], np.int32)


def load_state(
    run_dir: Path, checkpoint: str | int = "best"
) -> tuple[Config, TrainState, float | None]:
    """Loads the config, a checkpoint's state, and the best validation loss if any.

    opt_state is None if only parameters were imported. Raises as `load_run` does.
    """
    config, mesh, folder = load_config(run_dir), host_mesh(), run_dir / CHECKPOINTS
    model = build_model(config.model, platform_of(mesh))
    state = restore_state(folder, checkpoint, abstract_state(model, config, mesh))
    return config, state, best_metric(folder)


def find_checkpoint(run_dir: Path, which: str | int) -> Path:
    """Returns the absolute path of a run's checkpoint: "best", "latest" or a step.

    Does not check it for damage. Raises OSError or ValueError if there is none.
    """
    load_config(run_dir)
    folder = run_dir.resolve() / CHECKPOINTS
    return folder / str(find_steps(folder, which)[0])


def has_run(run_dir: Path) -> bool:
    """Whether the directory holds a run, finished or not."""
    return (run_dir / CONFIG).exists()


@contextmanager
def claim_run(run_dir: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Creates the directory if needed, and locks it against other training runs.

    Of several processes the first locks it for all. Raises FileExistsError if it holds
    a run and neither `resume` nor `overwrite` is set, if it holds other files, or if
    another training run has locked it.
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
            raise FileExistsError(f"process 0 could not lock {run_dir}; see its error")
        _check_shared(run_dir, token)
        yield


def _check_shared(run_dir: Path, token: int) -> None:
    """Raises FileNotFoundError unless all processes see the same run directory."""
    lock = run_dir / LOCK
    for wait in (0, 1, 4, 10):  # a network file system may be slow
        time.sleep(wait)
        if seen := lock.exists() and lock.read_text(encoding="utf-8") == str(token):
            break
    if any_failed(not seen):
        raise FileNotFoundError(
            f"{run_dir} is not the same directory for all processes; give an --out-dir "
            "on a file system that they share"
        )


def _claim(run_dir: Path, may_exist: bool) -> IO[str]:
    """Locks the run directory until the returned file is closed."""
    if run_dir.is_file():
        raise FileExistsError(f"{run_dir} is a file; choose another directory")
    found = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    ours = {LOCK, CHECKPOINTS} & found  # config.json alone may be another program's
    expected = {LOCK, *_RUN_FILES} if ours else set()
    if ours and {CONFIG, CHECKPOINTS} & found:
        if not may_exist:
            raise FileExistsError(
                f"{run_dir} already holds a run; resume it with `train.py --resume`, "
                "replace it with --overwrite, or choose another directory"
            )
    elif foreign := {n for n in found - expected if not n.endswith(TMP_SUFFIX)}:
        raise FileExistsError(
            f"{run_dir} is not a run: it has {min(foreign)}; choose another directory"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = (run_dir / LOCK).open("w")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise FileExistsError(
            f"another process is training in {run_dir}; wait for it to end, or choose "
            "another directory"
        ) from None
    for name in _RUN_FILES:  # temporary files of a killed process
        for tmp_path in run_dir.glob(f"{name}.*{TMP_SUFFIX}"):
            delete(tmp_path)
    return lock


def clear_run(run_dir: Path) -> None:
    """Deletes the run's files, the config last; keeps other files."""
    if is_first_process():
        for path in (run_dir / name for name in _RUN_FILES):
            if path.is_dir() and not path.is_symlink():
                with temporary(path) as tmp_path:  # so that no reader sees half
                    path.rename(tmp_path)
            else:
                path.unlink(missing_ok=True)
    wait_for_all("clear")


def save_config(run_dir: Path, config: Config, tokenizer: Tokenizer | None) -> None:
    """Writes tokenizer.json, then config.json, which makes the directory a run."""
    text = json.dumps({"format": FORMAT} | config.to_dict(), indent=2) + "\n"
    if is_first_process():
        if tokenizer:
            replace_file(run_dir / TOKENIZER, tokenizer.save)
        replace_file(run_dir / CONFIG, lambda path: path.write_text(text, "utf-8"))


def load_config(run_dir: Path) -> Config:
    """Reads config.json; raises OSError or ValueError that names the file."""
    path = run_dir / CONFIG
    try:
        values = json.loads(path.read_bytes())  # in any UTF, with or without a mark
        newer = isinstance(values, dict) and values.pop("format", 1) > FORMAT
        if not newer:
            return Config.from_dict(values)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{run_dir} is not a run: it has no {CONFIG}; runs are made by "
            "`python train.py --out-dir DIR` and `python -m jaxgpt import`"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a jaxgpt config: {error}; fix it, or restore it from "
            "a backup"
        ) from error
    raise ValueError(f"{run_dir} was made by a newer jaxgpt; update jaxgpt")
