"""Trains a model: text becomes batches, batches become better parameters.

python train.py [PRESET] [--out-dir DIR] [--resume] [--section.field VALUE ...]
"""

import sys
import time
from functools import cache, partial
from pathlib import Path

from jaxgpt import runtime
from jaxgpt.arguments import RunOptions, parse_arguments
from jaxgpt.config import Config
from jaxgpt.generation.stream import generate
from jaxgpt.models import build_model
from jaxgpt.run import CHECKPOINTS, load_run, prepare_run, save_config
from jaxgpt.text.batches import stack_batches
from jaxgpt.text.corpus import load_corpus
from jaxgpt.training.checkpoint import open_checkpoints, restore_state, save_state
from jaxgpt.training.evaluation import estimate_losses, exact_loss
from jaxgpt.training.monitor import Monitor, log_line
from jaxgpt.training.plan import describe
from jaxgpt.training.sharding import make_mesh
from jaxgpt.training.step import (
    compile_eval_step,
    compile_train_steps,
    create_state,
    next_stop,
)

STARTED = time.monotonic()


def main() -> None:
    """Parses the command line, then trains, or tells what training would cost."""
    runtime.start()
    config, run_dir, options = parse_arguments(sys.argv[1:])
    if options.dry_run:
        print("\n".join(describe(config)))
        return
    if signal := train(config, run_dir, options):
        log_line(f"saved; go on with: python train.py --out-dir {run_dir} --resume")
        sys.exit(128 + signal)
    run = load_run(run_dir)
    if run.tokenizer:
        log_line(f"a sample of the best checkpoint, step {run.step}:")
        print(generate(run, "", max_new_tokens=400)[0])


def train(config: Config, run_dir: Path, options: RunOptions) -> int:
    """Runs the experiment; returns the signal that stopped it early, or 0."""
    corpus, config = load_corpus(config, log_line)
    mesh = make_mesh(config, log_line)
    model = build_model(config.model)
    train_steps = cache(partial(compile_train_steps, model, config, mesh))
    eval_step = compile_eval_step(model, mesh)

    prepare_run(run_dir, resume=options.resume, overwrite=options.overwrite)
    save_config(run_dir, config, corpus.tokenizer)
    checkpoints = open_checkpoints(run_dir / CHECKPOINTS, create=True)
    resumed_step = checkpoints.latest_step()
    if resumed_step is None:
        state, step = create_state(model, config, mesh), 0
    else:
        state = restore_state(checkpoints, resumed_step, model, config, mesh)
        step = resumed_step
        log_line(f"resuming {run_dir} from step {step}")

    with (
        checkpoints,
        Monitor(run_dir, config, resumed_step, STARTED) as monitor,
        runtime.deferred_interrupts() as interrupt,
    ):
        if resumed_step is None:
            monitor.eval(0, **estimate_losses(eval_step, state.params, corpus, config))
        while step < config.train.max_steps and not interrupt.signal:
            stop = next_stop(step, config.train)
            run_steps = train_steps(stop - step)  # compiles each count once
            batches = stack_batches(corpus.train, range(step, stop), config)
            started = time.monotonic()
            state, metrics = run_steps(state, batches)
            monitor.train(step, metrics, started)
            step = stop

            val_loss = None
            if step % config.train.eval_interval == 0 or step == config.train.max_steps:
                monitor.flush()
                losses = estimate_losses(eval_step, state.params, corpus, config)
                monitor.eval(step, **losses)
                val_loss = losses["val_loss"]
            if val_loss or step % config.train.checkpoint_interval == 0:
                monitor.flush()
                save_state(checkpoints, state, val_loss)

        monitor.flush()
        if step < config.train.max_steps:  # interrupted
            if checkpoints.latest_step() != step:
                save_state(checkpoints, state, val_loss=None)
            return interrupt.signal
        monitor.done(step, exact_loss(eval_step, state.params, corpus.val, config))
        return 0


if __name__ == "__main__":
    with runtime.plain_errors():
        main()
