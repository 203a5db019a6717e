"""Diagnosis of a non-finite step: finds the first layer with non-finite outputs."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of, with_microbatches
from jaxgpt.parallel.feeding import shard_batch
from jaxgpt.terminal import log_line
from jaxgpt.text.batches import Source
from jaxgpt.training.objectives import Batch, Context, Objective
from jaxgpt.training.step import TrainState, dropout_key


@contextmanager
def diagnose_non_finite(
    state: Callable[[], TrainState],
    objective: Callable[[nn.Module], Objective],
    source: Source,
    config: Config,
    mesh: Mesh,
) -> Iterator[None]:
    """Adds the first layer with non-finite outputs to a FloatingPointError's message.

    `state` returns the state before the failed step; no later step has changed it.
    """
    try:
        yield
    except FloatingPointError as error:
        log_line(f"{error}; looking for the first layer with non-finite outputs")
        step = f"step {int(state().step) + 1}"
        try:
            layer = first_non_finite_layer(state(), objective, source, config, mesh)
        except Exception as failure:  # must not hide the error itself
            result = f"the layers of {step} could not be checked ({failure})"
        else:
            result = f"the outputs of every layer in {step} are finite"
            if layer:
                result = f"the first non-finite outputs in {step} are those of {layer}"
        raise FloatingPointError(f"{error}; {result}") from error


def first_non_finite_layer(
    state: TrainState,
    objective: Callable[[nn.Module], Objective],
    source: Source,
    config: Config,
    mesh: Mesh,
) -> str:
    """Names the first layer with non-finite outputs in the step after `state`, or "".

    `objective` makes an objective from a model, as `next_token` does; `source` has the
    training batches. Every process of the run must call it.
    """
    # Under remat, the layers' values can't be inspected.
    changed: dict[str, Any] = {"remat": False} if hasattr(config.model, "remat") else {}
    model = dataclasses.replace(config.model, **changed)
    losses = objective(build_model(model, platform_of(mesh)))
    step = int(state.step)
    microbatches = with_microbatches(config, mesh).data.microbatches
    batch, key = source(step, slice(None)), dropout_key(config, step)
    rows_B = np.arange(len(jax.tree.leaves(batch)[0]))
    for i in range(microbatches):
        part, rows = jax.tree.map(lambda a, i=i: a[i::microbatches], (batch, rows_B))
        part, rows = shard_batch(mesh, (part, rows))
        if layer := _first_layer(losses, state.params, part, Context(key, rows)):
            return layer
    return ""


def _first_layer(
    objective: Objective, params: Any, batch: Batch, context: Context
) -> str:
    """The first layer whose output is not finite, found by running without jit."""
    calls: Counter[tuple[str, ...]] = Counter()
    found: list[str] = []

    def check(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        arrays = jax.tree.leaves(out)
        traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
        if context.method_name == "__call__" and not (traced or found):
            path = context.module.path
            if not all(bool(jnp.isfinite(array).all()) for array in arrays):
                block = path[: path.index("h") + 1] if "h" in path else ()
                layer = [str(calls[block])] if block else []  # all share one module
                name = ".".join([*block, *layer, *path[len(block) :]])
                found.append(name or "the model")
            calls[path] += 1
        return out

    with jax.disable_jit(), nn.intercept_methods(check):
        objective(params, batch, context)
    return found[0] if found else ""
