"""A step that blew up: the first layer where it shows, and how to take it again.

B batch   T time   L layers
"""

import itertools
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.files import is_first_process, log_line
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of, with_microbatches
from jaxgpt.parallel.feeding import share_rows
from jaxgpt.parallel.mesh import activations_over, replicated
from jaxgpt.parallel.processes import wait_for_all
from jaxgpt.run import BLOWUP, load_run, save_config
from jaxgpt.text.batches import stack_batches
from jaxgpt.text.corpus import Corpus
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.training.checkpoint import CHECKPOINTS, open_checkpoints, save_params
from jaxgpt.training.step import (
    Batch,
    TrainState,
    accumulate,
    step_key,
    training_loss,
)

_STEP = "step.npz"
_STACK = "h"  # the GPT's layers, whose arrays have an axis of n_layer before the others
_LARGEST = "largest"
_Path = tuple[str, ...]  # of a module or a parameter


@dataclass(frozen=True)
class Blowup:
    """A step that stopped a run, to be taken again.

    Attributes:
      config: of the run.
      params: before the step.
      step: updates completed before it.
      batch: i32 [B, T] each.
      key: of its dropout.
    """

    config: Config
    params: Any
    step: int
    batch: Batch
    key: jax.Array


def save_blowup(run_dir: Path, blowup: Blowup, tokenizer: Tokenizer | None) -> Path:
    """Writes the step into RUN_DIR/blowup, in place of an earlier one.

    The folder, which is returned, is a run of these parameters, and can be sampled.
    """
    folder = run_dir / BLOWUP
    if is_first_process():
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_all("blowup")
    with open_checkpoints(folder / CHECKPOINTS) as checkpoints:
        save_params(checkpoints, blowup.step, blowup.params)
    if is_first_process():
        (inputs, targets), key = blowup.batch, jax.random.key_data(blowup.key)
        with (folder / _STEP).open("wb") as file:
            np.savez(file, inputs=inputs, targets=targets, key=key)
    save_config(folder, blowup.config, tokenizer)
    return folder


def load_blowup(folder: Path, mesh: Mesh) -> Blowup:
    """Reads what `save_blowup` wrote, the parameters placed on the mesh.

    Raises OSError or ValueError that says what is missing or damaged.
    """
    if not (folder / _STEP).is_file():
        raise FileNotFoundError(
            f"{folder} has no {_STEP}; give the folder {BLOWUP} of a run that a loss "
            "or a gradient which is not finite has stopped"
        )
    run = load_run(folder, "latest", mesh)
    try:
        with (folder / _STEP).open("rb") as file, np.load(file) as saved:
            batch = (saved["inputs"], saved["targets"])
            key = jax.random.wrap_key_data(saved["key"])
    except Exception as error:  # of many kinds, for a file that is damaged
        raise ValueError(
            f"{folder / _STEP} is damaged ({error}); bring it back from a copy, or let "
            "the run blow up again"
        ) from error
    return Blowup(run.config, run.params, run.step, batch, key)


@dataclass(frozen=True)
class Diagnosis:
    """What a step's values were.

    Attributes:
      loss: in nats per token.
      grad_norm: before clipping.
      activations: the largest magnitude in what each layer gave, in the order of the
        forward pass; infinite if any was not finite.
      gradients: the same of each parameter's gradient, in the order of the backward
        pass.
    """

    loss: float
    grad_norm: float
    activations: dict[str, float]
    gradients: dict[str, float]

    @property
    def first(self) -> str:
        """The first values that are not finite, "" if all are."""
        for kind in ("activations", "gradients"):
            for name, value in getattr(self, kind).items():
                if not np.isfinite(value):
                    return f"{kind} of {name}"
        if not np.isfinite(self.grad_norm):
            largest = max(self.gradients, key=self.gradients.__getitem__)
            return f"squares of the gradients of {largest}"
        return ""


def diagnose(
    config: Config, params: Any, batch: Batch, key: jax.Array, mesh: Mesh
) -> Diagnosis:
    """Takes a step's loss and gradients again, and looks at every layer.

    Args:
      config: of the run.
      params: before the step, placed on the mesh.
      batch: the whole, i32 [B, T] each.
      key: of the step's dropout.
      mesh: of the run, so that rounding is the same.
    """
    model = build_model(config.model, platform_of(mesh))
    pieces = with_microbatches(config, mesh).data.pieces
    loss_fn = partial(training_loss, model, key)
    inputs_BT, targets_BT = map(np.asarray, batch)
    rows_B = np.arange(len(inputs_BT))
    place = partial(share_rows, mesh)
    on_all = partial(jax.jit, out_shardings=replicated(mesh))
    order: dict[_Path, None] = {}  # of the layers, as they end

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if context.method_name == "__call__":
            order[context.module.path] = None
            # All axes stay, since the models' scans and maps put theirs among them.
            array = jax.tree.leaves(out)[0]  # a cache may stand beside it
            largest = _magnitudes(array).max(keepdims=True)
            context.module.sow("intermediates", _LARGEST, largest)
        return out

    @on_all
    def outputs(params: Any, *rows: jax.Array) -> dict[_Path, jax.Array]:
        with nn.intercept_methods(note):
            inputs, rows_B = rows
            _, sown = model.apply(
                {"params": params},
                inputs,
                deterministic=False,
                rows_B=rows_B,
                rngs={"dropout": key},
                mutable="intermediates",
            )
        return {
            path[:-1]: _largest(path, values[0])
            for path, values in flatten_dict(sown["intermediates"]).items()
            if path[-1] == _LARGEST
        }

    @on_all
    def gradients(params: Any, *rows: jax.Array) -> Any:
        loss, grads = accumulate(jax.value_and_grad(loss_fn), params, rows, pieces)
        flat = flatten_dict(grads)
        largest = {path: _largest(path, leaf) for path, leaf in flat.items()}
        return loss, optax.tree.norm(grads), largest

    with activations_over(mesh):
        of_pieces = [
            outputs(params, place(inputs_BT[i::pieces]), place(rows_B[i::pieces]))
            for i in range(pieces)
        ]
        rows = map(place, (inputs_BT, targets_BT, rows_B))
        loss, grad_norm, of_parameters = gradients(params, *rows)
    forward = list(order)
    of_layers = jax.tree.map(lambda *values: np.max(values, 0), *of_pieces)
    named = sorted(of_parameters, key=lambda path: forward.index(path[:-1]))
    return Diagnosis(
        float(loss),
        float(grad_norm),
        _by_layer(forward, of_layers),
        dict(reversed(_by_layer(named, jax.device_get(of_parameters)).items())),
    )


def _largest(path: _Path, array: jax.Array) -> jax.Array:
    """The largest magnitude: of the GPT's stacked layers [L], else a scalar."""
    axes = tuple(range(1 if path[0] == _STACK else 0, array.ndim))
    return _magnitudes(array).max(axis=axes)


def _magnitudes(array: jax.Array) -> jax.Array:
    """Of finite values; else infinity, for XLA's maximum on CPU may pass over a NaN."""
    return jnp.where(jnp.isfinite(array), jnp.abs(array), jnp.inf)


def _by_layer(order: list[_Path], largest: dict[_Path, np.ndarray]) -> dict[str, float]:
    """The values by name, those of stacked layers one layer after the other."""
    named: dict[str, float] = {}
    for stacked, group in itertools.groupby(order, lambda p: p[:1] == (_STACK,)):
        paths = list(group)
        for layer in range(len(largest[paths[0]])) if stacked else [None]:
            for path in paths:
                value = largest[path] if layer is None else largest[path][layer]
                words = path if layer is None else (_STACK, str(layer), *path[1:])
                named[".".join(words) or "logits"] = float(value)
    return named


@contextmanager
def explained(
    state: Callable[[], TrainState],
    run_dir: Path,
    config: Config,
    corpus: Corpus,
    mesh: Mesh,
) -> Iterator[None]:
    """Has a FloatingPointError say where it began, and saves the step to take again.

    The state, which no step has changed since, is the one before that step.
    """
    try:
        yield
    except FloatingPointError as error:
        log_line(f"{error}; looking for the layer where it began")
        params, step, told = state().params, int(state().step), [str(error)]
        inputs, targets = stack_batches(corpus.train, range(step, step + 1), config)
        key, batch = step_key(config, step), (inputs[0], targets[0])
        # Whatever happens from here on, the error itself must be told.
        try:
            blowup = Blowup(config, params, step, batch, key)
            folder = save_blowup(run_dir, blowup, corpus.tokenizer)
            command = f"python -m jaxgpt replay {shlex.quote(str(folder))}"
            told.append(f"take step {step + 1} again with: {command}")
        except Exception as failure:
            told.append(f"step {step + 1} could not be kept ({failure})")
        try:
            first = diagnose(config, params, batch, key, mesh).first
            where = f"the {first} are the first that are not" if first else "all are"
            told.insert(1, f"of the values of step {step + 1} {where} finite")
        except Exception as failure:
            told.append(f"its layers could not be looked at ({failure})")
        raise FloatingPointError("; ".join(told)) from error
