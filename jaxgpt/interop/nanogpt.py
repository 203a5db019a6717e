"""nanoGPT's checkpoints, ckpt.pt: read them, and write what nanoGPT resumes from.

Source: nanoGPT train.py, and model.py (`configure_optimizers`).
"""

import dataclasses
import operator
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt.config import TOO_MUCH, Config, GPTConfig
from jaxgpt.files import replace_file
from jaxgpt.interop import required
from jaxgpt.interop.state_dict import (
    MASKS,
    check_gpt,
    from_state_dict,
    parameter_names,
    to_state_dict,
)
from jaxgpt.training.optimizer import learning_rate_schedule, make_optimizer
from jaxgpt.training.step import TrainState

_MODEL = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
# Settings that nanoGPT's train.py has under the same name, by our section.
_SAME = {
    "data": ("gradient_accumulation_steps",),
    "optimizer": (
        "learning_rate",
        "min_lr",
        "weight_decay",
        "beta1",
        "beta2",
        "grad_clip",
    ),
    "train": ("eval_interval", "eval_iters", "log_interval"),
}
# What values of other types than nanoGPT's raise, in our hands or in PyTorch's.
_ODD_VALUES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
_NO_LOSS_YET = 1e9  # nanoGPT's best_val_loss before its first evaluation


def read_nanogpt(
    path: Path, log: Callable[[str], None]
) -> tuple[Config, TrainState, float | None]:
    """Reads a ckpt.pt; its optimizer state too, where it has one.

    Args:
      path: of the file. It is read as tensors and plain values; no code in it is run.
      log: called with a line on what cannot be taken over.

    Returns the config, with nanoGPT's settings for training; the state, whose opt_state
    is None if the checkpoint has none; and the best validation loss, if it tells.
    Raises ImportError without torch, OSError or ValueError if it is no such checkpoint.
    """
    with warnings.catch_warnings(action="ignore"):  # PyTorch's, of odd tensors
        checkpoint = _load(path)
        try:
            config = _config(checkpoint, log)
            tensors = checkpoint["model"]
            step = _count("iter_num", checkpoint["iter_num"])
            params = _params(tensors, config.model)
            opt_state = _read_optimizer(checkpoint, config, params, log)
            val_loss = float(checkpoint.get("best_val_loss", _NO_LOSS_YET))
        except KeyError as error:
            raise ValueError(
                f"{path} is not a checkpoint of nanoGPT: it has no {error}"
            ) from error
        except _ODD_VALUES as error:
            raise ValueError(f"{path}: {error}") from error
    state = TrainState(jnp.asarray(step, jnp.int32), params, opt_state)
    return config, state, val_loss if 0 <= val_loss < _NO_LOSS_YET else None


def write_nanogpt(
    path: Path,
    config: Config,
    state: TrainState,
    val_loss: float | None,
    dataset: str,
) -> None:
    """Writes a ckpt.pt that nanoGPT's sample.py and `train.py --init_from=resume` load.

    Args:
      path: of the file.
      config: of the run; its model must be a GPT.
      state: its opt_state may be None: nanoGPT then begins with fresh moments.
      val_loss: the best so far, in nats per token.
      dataset: nanoGPT looks for the vocabulary in data/DATASET/meta.pkl.

    Raises ImportError without torch, ValueError if nanoGPT has no such model.
    """
    torch = required("torch")
    model = config.model
    check_gpt(model, "nanoGPT")
    tensors = _tensors(state.params, model)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    content = {
        "model": tensors,
        "optimizer": _write_optimizer(config, state),
        "model_args": {name: getattr(model, name) for name in _MODEL}
        | {"bias": model.bias, "dropout": float(model.dropout)},
        "iter_num": int(state.step),
        "best_val_loss": _NO_LOSS_YET if val_loss is None else float(val_loss),
        "config": _settings(config) | {"dataset": dataset},
    }
    replace_file(path, lambda aside: torch.save(content, aside))


def _load(path: Path) -> dict[str, Any]:
    torch = required("torch")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a ckpt.pt of nanoGPT")
    mapped = zipfile.is_zipfile(path)
    try:
        checkpoint = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and plain values, or is no checkpoint; no "
            "code in it was run"
        ) from error
    except Exception as error:  # of many kinds, for a file that is damaged
        raise ValueError(
            f"{path} is not a checkpoint of PyTorch, or is cut short ("
            + f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(": ")
            + ")"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} is not a checkpoint of nanoGPT, but a {type(checkpoint).__name__}"
        )
    for name in ("model", "model_args", "config"):
        kind = type(checkpoint.get(name, {}))
        if not issubclass(kind, dict):
            raise ValueError(f"{path}: its {name} is a {kind.__name__}, not a dict")
    return checkpoint


def _params(tensors: dict[str, Any], config: GPTConfig) -> Any:
    """A tree like the parameters, of tensors that are [out, in]."""
    for name, tensor in tensors.items():
        if not MASKS.search(name) and not _is_whole(tensor):
            raise ValueError(f"{name} is no tensor of real numbers, all in the file")
    shapes = {name: getattr(tensor, "shape", ()) for name, tensor in tensors.items()}

    def read(name: str) -> np.ndarray:
        return tensors[name].detach().float().numpy()  # NumPy has no bfloat16

    params = from_state_dict(shapes, read, config, out_in=True)
    return jax.tree.map(jnp.asarray, params)


def _is_whole(tensor: Any) -> bool:
    """Whether it is a tensor of floats, and its storage has as many as it claims."""
    torch = required("torch")
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.is_cpu
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


def _count(name: str, value: Any) -> int:
    count = int(value)
    if not 0 <= count < TOO_MUCH:
        raise ValueError(f"{name}={count} must be at least 0, under {TOO_MUCH}")
    return count


def _config(checkpoint: dict[str, Any], log: Callable[[str], None]) -> Config:
    args = checkpoint["model_args"]
    # Old files leave out what has nanoGPT's own default.
    optional = {"bias": True, "dropout": 0.0}
    given = {name: args.get(name, value) for name, value in optional.items()}
    model = GPTConfig(**{name: args[name] for name in _MODEL}, **given)
    settings = checkpoint.get("config", {})
    end, last = (settings.get(name) for name in ("lr_decay_iters", "max_iters"))
    if end != last and settings.get("decay_lr", True):
        log(
            f"its lr_decay_iters={end} is not taken over: here the learning rate "
            f"reaches min_lr at max_steps={last}"
        )
    try:
        return _trained_as(settings, model)
    except (ValueError, TypeError) as error:
        log(f"its settings for training are not taken over: {error}")
        return Config(model=model)


def _trained_as(settings: dict[str, Any], model: GPTConfig) -> Config:
    """The config of nanoGPT's settings; what they leave out keeps our defaults."""
    sections: dict[str, dict[str, Any]] = {
        section: {name: settings[name] for name in names if name in settings}
        for section, names in _SAME.items()
    }
    if "batch_size" in settings:
        pieces = settings.get("gradient_accumulation_steps", 1)
        rows = operator.index(settings["batch_size"]) * operator.index(pieces)
        sections["data"]["batch_size"] = rows
    if "max_iters" in settings:
        sections["train"]["max_steps"] = settings["max_iters"]
    if "warmup_iters" in settings:
        sections["optimizer"]["warmup_steps"] = settings["warmup_iters"]
    if not settings.get("decay_lr", True):
        constant = {"min_lr": settings["learning_rate"], "warmup_steps": 0}
        sections["optimizer"] |= constant
    config = Config.from_dict(sections)
    return dataclasses.replace(config, model=model)


def _settings(config: Config) -> dict[str, Any]:
    """The config under nanoGPT's names."""
    settings: dict[str, Any] = {
        name: getattr(getattr(config, section), name)
        for section, names in _SAME.items()
        for name in names
    }
    return settings | {
        "batch_size": config.data.rows_at_once,
        "gradient_accumulation_steps": config.data.pieces,
        "block_size": config.model.block_size,
        "max_iters": config.train.max_steps,
        "lr_decay_iters": config.train.max_steps,
        "warmup_iters": config.optimizer.warmup_steps,
        "decay_lr": True,
    }


def _tensors(tree: Any, config: GPTConfig) -> dict[str, Any]:
    """A tree like the parameters as tensors of their own, [out, in]."""
    torch = required("torch")
    arrays = to_state_dict(tree, config, out_in=True)
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _in_groups(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Names of the parameters that nanoGPT's AdamW decays, and of the others.

    It numbers them in this order, and decays those of two dimensions.
    """
    names = parameter_names(config)
    decayed = [name for name in names if not (name.endswith(".bias") or ".ln_" in name)]
    return decayed, [name for name in names if name not in set(decayed)]


def _read_optimizer(
    checkpoint: dict[str, Any], config: Config, params: Any, log: Callable[[str], None]
) -> Any:
    """AdamW's state in optax's form, or None; log hears why one is left."""
    decayed, others = _in_groups(config.model)
    numbers = {name: number for number, name in enumerate([*decayed, *others])}
    try:
        states = dict(dict(checkpoint.get("optimizer", {"state": {}}))["state"])
        if not states:
            return None

        def moments(kind: str) -> Any:
            tensors = {name: dict(states[n])[kind] for name, n in numbers.items()}
            return _params(tensors, config.model)

        mu, nu = moments("exp_avg"), moments("exp_avg_sq")
        updates = jnp.asarray(_count("step", states[0]["step"]), jnp.int32)
    except _ODD_VALUES as error:
        log(f"its optimizer state is not taken over, it is not nanoGPT's: {error}")
        return None
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    empty = jax.eval_shape(optimizer.init, params)
    # The schedule counts iterations, of which AdamW may have skipped some.
    step = jnp.asarray(checkpoint["iter_num"], jnp.int32)
    state = optax.tree.set(empty, count=step, mu=mu, nu=nu)
    adam = optax.tree.get(state, "ScaleByAdamState")._replace(count=updates)
    return optax.tree.set(state, ScaleByAdamState=adam)


def _write_optimizer(config: Config, state: TrainState) -> dict[str, Any]:
    """The `state_dict` of torch's AdamW."""
    torch = required("torch")
    groups, optimizer = _in_groups(config.model), config.optimizer
    rate = learning_rate_schedule(optimizer, config.train.max_steps)(int(state.step))
    placeholders = [
        {"params": [torch.zeros(0) for _ in names], "weight_decay": decay}
        for names, decay in zip(groups, (optimizer.weight_decay, 0.0), strict=True)
    ]
    saved = torch.optim.AdamW(
        placeholders,
        lr=float(rate),
        betas=(optimizer.beta1, optimizer.beta2),
    ).state_dict()
    if state.opt_state is None:
        return saved
    adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
    mu, nu = _tensors(adam.mu, config.model), _tensors(adam.nu, config.model)
    saved["state"] = {
        index: {
            "step": torch.tensor(float(adam.count)),
            "exp_avg": mu[name],
            "exp_avg_sq": nu[name],
        }
        for index, name in enumerate([*groups[0], *groups[1]])
    }
    return saved
