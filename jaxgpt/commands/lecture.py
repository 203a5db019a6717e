"""Trains every rung of the lecture's ladder, and checks losses against its figures.

S seeds   N steps per dispatch
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

from jaxgpt.config import Config, MeshConfig, check_seed
from jaxgpt.generation.stream import generate
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import (
    platform_of,
    steps_in_next_call,
    with_steps_per_call,
)
from jaxgpt.parallel.feeding import stack_batches
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.presets import PRESETS
from jaxgpt.run import Run
from jaxgpt.terminal import log_line
from jaxgpt.text.batches import training_source
from jaxgpt.text.corpus import Corpus, load_corpus
from jaxgpt.training.evaluation import evaluate_exactly, make_losses_step
from jaxgpt.training.objectives import Batch, next_token
from jaxgpt.training.optimizer import make_optimizer
from jaxgpt.training.step import (
    TrainState,
    create_state,
    make_train_step,
)


@dataclass(frozen=True)
class Rung:
    """A preset and the validation losses to compare with, in nats per token.

    Attributes:
      lecture: the loss read off in the lecture, an estimate from random batches.
      pytorch: exact losses of the same model in PyTorch with two seeds, if measured.
    """

    preset: str
    lecture: float
    pytorch: tuple[float, ...] = ()

    def agrees(self, loss: float) -> bool:
        """Whether `loss` is within 0.03 of the lecture's or 0.02 of PyTorch's."""
        losses = self.pytorch or (self.lecture,)
        in_band = min(losses) - 0.02 <= loss <= max(losses) + 0.02
        return in_band or abs(loss - self.lecture) <= 0.03


RUNGS = (
    Rung("lecture-bigram", 2.5, (2.487, 2.487)),
    Rung("lecture-single-head", 2.4, (2.408, 2.396)),
    Rung("lecture-multi-head", 2.28, (2.259, 2.271)),
    Rung("lecture-feed-forward", 2.24, (2.233, 2.244)),
    Rung("lecture-blocks", 2.33, (2.340, 2.285)),
    Rung("lecture-residual", 2.08, (2.101, 2.062)),
    Rung("lecture-layer-norm", 2.06, (2.082, 2.063)),
)
SCALED = Rung("lecture-scaled", 1.48)


def lecture(
    out_dir: Path | None = None,
    scaled: tyro.conf.FlagCreatePairsOff[bool] = False,
    steps_scale: float = 1.0,
    seeds: tuple[int, ...] = (1337, 1338, 1339),
) -> int:
    """Trains every rung of the lecture's ladder, and checks losses against its figures.

    The exit status is 0 if the mean loss of every rung agrees.

    Args:
        out_dir: for lecture.json and .png; default: runs/lecture or runs/lecture-trial
        scaled: train the last rung too, which takes a CPU half a day per seed
        steps_scale: fraction of the lecture's steps to train for; below 1, a trial
        seeds: seeds to train each rung with, all at the same time
    """
    if not 0 < steps_scale <= 1:
        raise ValueError(f"--steps-scale {steps_scale} must be above 0, up to 1")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {seeds} must be one or more distinct seeds")
    for seed in seeds:
        check_seed(seed)
    trial = steps_scale < 1  # must not overwrite the full results
    out_dir = out_dir or Path("runs", "lecture-trial" if trial else "lecture")
    out_dir.mkdir(parents=True, exist_ok=True)
    results_path, picture_path = out_dir / "lecture.json", out_dir / "lecture.png"
    rungs = (*RUNGS, SCALED) if scaled else RUNGS
    names = [rung.preset for rung in rungs]
    results: list[dict[str, Any]] = []
    for result in train_rungs(rungs, seeds, steps_scale):
        results.append(result)
        results.sort(key=lambda result: names.index(result["rung"]))
        content = {"seeds": seeds, "steps_scale": steps_scale, "rungs": results}
        results_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        plot(results, seeds, picture_path)
    Console(width=100, highlight=False).print(table(results))
    if trial:
        print(f"a trial, with {steps_scale:g} of the lecture's steps")
    for result in results:
        print(f"\n--- {result['rung']}: val loss {result['val_loss']:.3f}")
        print(result["sample"].strip())
    print(f"\nwritten: {results_path}, {picture_path}")
    return int(not all(result["passed"] for result in results))


def train_rungs(
    rungs: Sequence[Rung], seeds: Sequence[int], steps_scale: float
) -> Iterator[dict[str, Any]]:
    """Trains a rung on each device at the same time; yields the results as they come.

    The last rungs start first, as they take the longest. An error in a rung is raised
    at once, without waiting for the others.
    """
    load_corpus(Config(), log_line)  # fetches the text once, for all threads
    idle: SimpleQueue[jax.Device] = SimpleQueue()
    for device in jax.local_devices():
        idle.put(device)

    def train(rung: Rung) -> dict[str, Any]:
        device = idle.get()
        try:
            with jax.default_device(device):
                return train_rung(rung, seeds, steps_scale, device)
        finally:
            idle.put(device)

    pool = ThreadPoolExecutor(jax.local_device_count())
    try:
        for done in as_completed([pool.submit(train, rung) for rung in rungs[::-1]]):
            yield done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def train_rung(
    rung: Rung, seeds: Sequence[int], steps_scale: float, device: jax.Device
) -> dict[str, Any]:
    """Trains the rung's model with all seeds; returns its entry in lecture.json."""
    config = PRESETS[rung.preset]()
    max_steps = max(1, round(config.train.max_steps * steps_scale))
    interval = max(1, round(config.train.eval_interval * steps_scale))
    train = dataclasses.replace(
        config.train,
        max_steps=max_steps,
        eval_interval=interval,
        checkpoint_interval=interval,  # none is saved, but a dispatch ends there
    )
    config = dataclasses.replace(config, train=train, mesh=MeshConfig(data=1))
    corpus, config = load_corpus(config, log_line)
    started = time.monotonic()
    mesh, curve = make_mesh(config, devices=[device]), []
    config = with_steps_per_call(config, mesh)
    model = build_model(config.model, platform_of(device))
    losses_of = make_losses_step(model, mesh)
    for step, params_S in train_seeds(model, config, mesh, corpus, seeds):
        each_params = [jax.tree.map(itemgetter(s), params_S) for s in range(len(seeds))]
        losses = [
            evaluate_exactly(losses_of, params, corpus.val, config, mesh).nats_per_token
            for params in each_params
        ]
        curve.append({"step": step, "val_losses": losses})
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        log_line(f"{rung.preset}  step {step}/{max_steps}  val {shown}")
    seconds, mean = time.monotonic() - started, float(np.mean(losses))
    run = Run(config, corpus.tokenizer, model, each_params[0], step)
    (sample,) = generate(run, "", max_new_tokens=300, temperature=1.0)
    return {
        "rung": rung.preset,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "steps": step,
        "seconds": seconds,
        "val_losses": losses,
        "val_loss": mean,
        "lecture": rung.lecture,
        "difference": mean - rung.lecture,
        "pytorch": rung.pytorch,
        "passed": rung.agrees(mean),
        "curve": curve,
        "sample": sample,
    }


def train_seeds(
    model: nn.Module, config: Config, mesh: Mesh, corpus: Corpus, seeds: Sequence[int]
) -> Iterator[tuple[int, Any]]:
    """Trains the model with all seeds at once, by `vmap` of the train step.

    Each seed gets the initialisation, batches and dropout of `train.py --train.seed`;
    its result differs from that run's only by rounding.

    Yields the step and the parameters [S, ...] every `eval_interval` updates and at the
    end. The parameters are donated to the next dispatch once the iterator advances.
    """
    objective, seeds_S = next_token(model), jnp.array(seeds, jnp.uint32)
    optimizer = make_optimizer(config.optimizer, config.train.max_steps)

    @partial(jax.jit, donate_argnums=0)
    def train_all_seeds(states_S: TrainState, batches_S: Batch) -> TrainState:
        def train_steps(seed: jax.Array, state: TrainState, batches: Batch) -> Any:
            train_step = make_train_step(objective, optimizer, config, seed=seed)
            return jax.lax.scan(train_step, state, batches)[0]

        return jax.vmap(train_steps)(seeds_S, states_S, batches_S)

    seeded = [
        dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        for seed in seeds
    ]
    sources = [training_source(corpus.train, each) for each in seeded]
    states_S = _stacked([create_state(model, each, mesh) for each in seeded])
    step = 0
    while step < config.train.max_steps:
        steps = range(step, step + steps_in_next_call(step, config.train))
        batches_S = _stacked([stack_batches(source, steps) for source in sources])
        states_S = train_all_seeds(states_S, batches_S)
        step = steps.stop
        if step % config.train.eval_interval == 0 or step == config.train.max_steps:
            yield step, states_S.params


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def table(results: list[dict[str, Any]]) -> Table:
    """A table of the results and the lecture's figures, which prints as Markdown."""
    grid = Table("rung", box=box.MARKDOWN)
    figures = "parameters, seconds, val loss, lecture, difference, PyTorch, verdict"
    for name in figures.split(", "):
        grid.add_column(name, justify="right", no_wrap=True)
    for result in results:
        grid.add_row(
            result["rung"].removeprefix("lecture-"),
            f"{result['parameters']:,}",
            f"{result['seconds']:.0f}",
            f"{result['val_loss']:.3f}",
            f"{result['lecture']:.2f}",
            f"{result['difference']:+.3f}",
            ", ".join(f"{loss:.3f}" for loss in sorted(result["pytorch"])),
            "pass" if result["passed"] else "FAIL",
        )
    return grid


def plot(results: list[dict[str, Any]], seeds: Sequence[int], path: Path) -> None:
    """Plots each rung's validation loss as a PNG: the mean and range over seeds."""
    from matplotlib.figure import Figure  # takes half a second, needed only here

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, result in enumerate(results):
        colour = f"C{index}"
        steps = [point["step"] for point in result["curve"]]
        losses = np.array([point["val_losses"] for point in result["curve"]])
        label = f"{result['rung'].removeprefix('lecture-')}  {result['val_loss']:.2f}"
        axes.plot(steps, losses.mean(1), marker=".", color=colour, label=label)
        axes.fill_between(steps, losses.min(1), losses.max(1), color=colour, alpha=0.2)
        axes.plot(steps[-1], result["lecture"], "x", color=colour, markersize=9)
    axes.plot([], [], "x", color="black", markersize=9, label="the lecture's")
    axes.set(
        xlabel="step",
        ylabel="validation loss, nats per character",
        title=f"mean and spread over seeds {', '.join(map(str, seeds))}",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
