"""Reads nanoGPT's checkpoints (ckpt.pt), and writes ones that nanoGPT can resume.

Source: nanoGPT train.py, and model.py (`configure_optimizers`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config import Config, GPTConfig
from jaxgpt.files import plain_path, replace_file
from jaxgpt.interop import required, state_dict
from jaxgpt.training.optimizer import learning_rate_schedule, make_optimizer
from jaxgpt.training.step import TrainState

_MODEL = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")
_OLD_DEFAULTS = {"bias": True, "dropout": 0.0}  # nanoGPT's, for older files
# nanoGPT's names for our settings, by config section.
_SETTINGS = {
    "data": {"gradient_accumulation_steps": "gradient_accumulation_steps"},
    "optimizer": {
        "learning_rate": "learning_rate",
        "min_lr": "min_lr",
        "warmup_iters": "warmup_steps",
        "weight_decay": "weight_decay",
        "beta1": "beta1",
        "beta2": "beta2",
        "grad_clip": "grad_clip",
    },
    "train": {
        "max_iters": "max_steps",
        "eval_interval": "eval_interval",
        "eval_iters": "eval_iters",
        "log_interval": "log_interval",
    },
}
_NO_LOSS_YET = 1e9  # nanoGPT's best_val_loss before its first evaluation


def read_nanogpt(
    path: Path, log: Callable[[str], None]
) -> tuple[Config, TrainState, float | None]:
    """Reads a ckpt.pt, including its optimizer state if it has one.

    Args:
      path: the file. Only tensors and plain values are read; no code in it is run.
      log: called with a line for each part that can't be imported.

    Returns the config, with nanoGPT's training settings; the state, whose opt_state is
    None if the checkpoint has none; and the best validation loss, or None if unknown.
    Raises ImportError without torch, OSError or ValueError for any other file.
    """
    torch = required("torch")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give a ckpt.pt of nanoGPT")
    try:
        with plain_path(path) as plain:
            checkpoint = torch.load(
                plain, map_location="cpu", weights_only=True, mmap=True
            )
    except Exception as error:  # a damaged file raises many kinds of errors
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, is truncated, or contains more than "
            "tensors and plain values; no code in it was run"
        ) from error
    try:
        config = _config(checkpoint["model_args"], checkpoint.get("config", {}), log)
        model = state_dict.check_gpt(config.model, "nanoGPT")
        params = _params(checkpoint["model"], model)
        step = jnp.asarray(int(checkpoint["iter_num"]), jnp.int32)
        opt_state = _read_optimizer(checkpoint, config, params, step, log)
        val_loss = float(checkpoint.get("best_val_loss", _NO_LOSS_YET))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # values of the wrong type raise many kinds of errors
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not a nanoGPT checkpoint: {reason}") from error
    state = TrainState(step, params, opt_state)
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
      path: the file to write.
      config: the run's config; its model must be a GPT.
      state: if its opt_state is None, or of PPO, nanoGPT starts with fresh moments.
      val_loss: the best validation loss so far, in nats per token.
      dataset: nanoGPT looks for the vocabulary in data/DATASET/meta.pkl.

    Raises ImportError without torch, ValueError if the model is not a GPT.
    """
    torch = required("torch")
    model = state_dict.check_gpt(config.model, "nanoGPT")
    tensors = _tensors(state.params, model)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    args = {name: getattr(model, name) for name in _MODEL}
    content = {
        "model": tensors,
        "optimizer": _write_optimizer(config, state),
        "model_args": args | {"dropout": float(model.dropout)},
        "iter_num": int(state.step),
        "best_val_loss": _NO_LOSS_YET if val_loss is None else float(val_loss),
        "config": _settings(config) | {"dataset": dataset},
    }
    replace_file(path, lambda tmp_path: torch.save(content, tmp_path))


def _config(
    args: dict[str, Any], settings: dict[str, Any], log: Callable[[str], None]
) -> Config:
    """Our config; training settings missing from nanoGPT's keep our defaults."""
    args = _OLD_DEFAULTS | args
    model = GPTConfig(**{name: args[name] for name in _MODEL})
    decays = settings.get("decay_lr", True)
    end, last = (settings.get(name) for name in ("lr_decay_iters", "max_iters"))
    if end != last and decays:
        log(
            f"lr_decay_iters={end} is not imported: here the learning rate reaches "
            f"min_lr at max_steps={last}"
        )
    try:
        sections: dict[str, dict[str, Any]] = {
            section: {names[name]: settings[name] for name in names if name in settings}
            for section, names in _SETTINGS.items()
        }
        if "batch_size" in settings:  # nanoGPT's is the size of a microbatch
            count = int(settings.get("gradient_accumulation_steps", 1))
            sections["data"]["batch_size"] = int(settings["batch_size"]) * count
        if not decays:
            constant = {"min_lr": settings["learning_rate"], "warmup_steps": 0}
            sections["optimizer"] |= constant
        return dataclasses.replace(Config.from_dict(sections), model=model)
    except Exception as error:  # values of the wrong type raise many kinds of errors
        log(f"the training settings are not imported: {error}")
        return Config(model=model)


def _settings(config: Config) -> dict[str, Any]:
    """The config's settings under nanoGPT's names."""
    settings: dict[str, Any] = {
        name: getattr(getattr(config, section), ours)
        for section, names in _SETTINGS.items()
        for name, ours in names.items()
    }
    return settings | {
        "batch_size": config.data.microbatch_size,
        "gradient_accumulation_steps": config.data.microbatches,
        "block_size": config.model.block_size,
        "lr_decay_iters": config.train.max_steps,
        "decay_lr": True,
    }


def _params(tensors: dict[str, Any], config: GPTConfig) -> Any:
    """Converts [out, in] tensors to a tree like the parameters."""
    return state_dict.from_state_dict(
        {name: getattr(tensor, "shape", ()) for name, tensor in tensors.items()},
        lambda name: tensors[name].detach().float().numpy(),  # NumPy has no bfloat16
        config,
        out_in=True,
    )


def _tensors(tree: Any, config: GPTConfig) -> dict[str, Any]:
    """Copies a tree like the parameters to [out, in] tensors."""
    torch = required("torch")
    arrays = state_dict.to_state_dict(tree, config, out_in=True)
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _groups(config: GPTConfig) -> tuple[list[str], list[str]]:
    """Names of the parameters that nanoGPT's AdamW decays, and of the others.

    Its state numbers the parameters in this order.
    """
    shapes = state_dict.torch_shapes(config)
    decayed = [name for name, shape in shapes.items() if len(shape) > 1]
    return decayed, [name for name, shape in shapes.items() if len(shape) == 1]


def _read_optimizer(
    checkpoint: dict[str, Any],
    config: Config,
    params: Any,
    step: jax.Array,
    log: Callable[[str], None],
) -> Any:
    """AdamW's state in optax's form, or None; logs why a state is not imported."""
    model = state_dict.check_gpt(config.model, "nanoGPT")
    names = [name for group in _groups(model) for name in group]
    try:
        states = checkpoint.get("optimizer", {"state": {}})["state"]
        if not states:
            return None
        mu, nu = (
            _params({name: states[i][kind] for i, name in enumerate(names)}, model)
            for kind in ("exp_avg", "exp_avg_sq")
        )
        count = jnp.asarray(int(states[0]["step"]), jnp.int32)
    except Exception as error:  # values of the wrong type raise many kinds of errors
        log(f"the optimizer state is not imported: {error}")
        return None
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)
    return optax.tree.set(
        jax.eval_shape(optimizer.init, params),
        ScaleByAdamState=optax.ScaleByAdamState(count, mu, nu),
        count=step,  # the schedule counts iterations, including any AdamW skipped
    )


def _write_optimizer(config: Config, state: TrainState) -> dict[str, Any]:
    """The optimizer state as the `state_dict` of torch's AdamW."""
    torch = required("torch")
    model = state_dict.check_gpt(config.model, "nanoGPT")
    groups, optimizer = _groups(model), config.optimizer
    rate = learning_rate_schedule(optimizer, config.train.max_steps)(int(state.step))
    placeholders = [
        {"params": [torch.zeros(0) for _ in names], "weight_decay": decay}
        for names, decay in zip(groups, (optimizer.weight_decay, 0.0), strict=True)
    ]
    betas = optimizer.beta1, optimizer.beta2
    adamw = torch.optim.AdamW(placeholders, lr=float(rate), betas=betas)
    saved = adamw.state_dict()
    if state.opt_state is not None and not config.ppo:  # whose moments are of more
        adam = optax.tree.get(state.opt_state, "ScaleByAdamState")
        mu, nu = _tensors(adam.mu, model), _tensors(adam.nu, model)
        step = float(adam.count)
        saved["state"] = {
            i: {"step": torch.tensor(step), "exp_avg": mu[name], "exp_avg_sq": nu[name]}
            for i, name in enumerate([*groups[0], *groups[1]])
        }
    return saved
