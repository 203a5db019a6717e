"""Trains a model on text and writes a run directory.

python train.py [PRESET] [--out-dir DIR] [--resume] [--section.field VALUE ...]
"""

import dataclasses
import itertools
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt import exits, start
from jaxgpt.classification import classify
from jaxgpt.cli import parse_arguments, read_options
from jaxgpt.config import Config, SamplingConfig, training_contradictions
from jaxgpt.generation.chat import answer
from jaxgpt.generation.stream import generate
from jaxgpt.generation.translation import translate
from jaxgpt.models import build_model
from jaxgpt.parallel import processes
from jaxgpt.parallel.defaults import (
    platform_of,
    steps_in_next_call,
    with_steps_per_call,
)
from jaxgpt.parallel.feeding import read_batches
from jaxgpt.parallel.mesh import make_mesh, model_mesh
from jaxgpt.planning.plan import describe
from jaxgpt.posttrain.iteration import before_and_after, prepare_rewarded
from jaxgpt.posttrain.ppo import on_prompts
from jaxgpt.posttrain.rewards import score_texts
from jaxgpt.run import (
    PROFILE,
    Run,
    claim_run,
    clear_run,
    has_run,
    load_config,
    load_initial_params,
    load_run,
    require_task,
    resumed_tokenizer,
    save_config,
    with_reference,
)
from jaxgpt.terminal import log_line
from jaxgpt.text.batches import evaluation_source, predictions, training_source
from jaxgpt.text.conversations import END_OF_TURN, Message
from jaxgpt.text.corpus import load_corpus, load_split
from jaxgpt.text.examples import Examples
from jaxgpt.text.packing import as_rows
from jaxgpt.text.tasks import kind_of
from jaxgpt.training import checkpoint, evaluation
from jaxgpt.training.diagnosis import diagnose_non_finite
from jaxgpt.training.loggers import check_installed
from jaxgpt.training.monitor import Monitor, check_finite
from jaxgpt.training.objectives import (
    Batch,
    make_objective,
    validation_metric,
)
from jaxgpt.training.profile import profiled
from jaxgpt.training.step import (
    abstract_state,
    check_skipped,
    create_state,
    make_train_program,
)

STARTED = time.monotonic()
# What to do with a run, by its kind of corpus.
_NEXT = {
    "next-token": "sample with: python generate.py --run-dir {}",
    "prompts": "sample with: python generate.py --run-dir {}",
    "classification": "classify with: python -m jaxgpt classify --run-dir {} TEXT",
    "masked-tokens": "fine-tune with: python train.py sentiment --init-from {}",
    "conversations": "chat with: python -m jaxgpt chat --run-dir {}",
    "preferences": "train against it with: python train.py ppo --reward-model {}",
    "translation": "translate with: python -m jaxgpt translate --run-dir {} TEXT",
}


def main() -> None:
    """Parses the command line, then trains, or prints what training would cost."""
    start.start()
    options = read_options(sys.argv[1:])[-1]
    if not (options.dry_run or options.plan):  # a plan needs only this process
        ids = options.num_processes, options.process_id
        processes.join_processes(options.coordinator_address, *ids)
    if processes.several_processes():
        log_line(f"{jax.process_count()} processes, {jax.device_count()} devices")
    config, run_dir, options = parse_arguments(sys.argv[1:])
    for line in training_contradictions(config):
        log_line(line)
    if options.dry_run or options.plan:
        for line in describe(config, options.plan):
            print(line, flush=True)
        return
    resume, overwrite = options.resume, options.overwrite
    dash = "./" if str(run_dir).startswith("-") else ""  # or it would be read as a flag
    quoted_dir = shlex.quote(f"{dash}{run_dir}")
    resume_command = f"python train.py --out-dir {quoted_dir} --resume"
    try:
        signal = train(config, run_dir, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        if has_run(run_dir):
            log_line(f"resume with: {resume_command}")
        raise
    if signal:
        log_line(f"stopped; resume with: {resume_command}")
        sys.exit(128 + signal)
    saved = load_config(run_dir)
    # What the model is for, however it was trained.
    plain = dataclasses.replace(saved, ppo=None, grpo=None, dpo=None)
    log_line(_NEXT[kind_of(plain)].format(quoted_dir))
    if not processes.several_processes():
        mesh = model_mesh(saved, dataclasses.replace(saved.mesh, data=1))
        show_sample(load_run(run_dir, mesh=mesh))


def show_sample(run: Run) -> None:
    """Prints a text by the model, or what it makes of a few validation examples."""
    tokenizer, kind = run.tokenizer, kind_of(run.config)
    if tokenizer is None or kind == "masked-tokens":
        return
    log_line(f"sample from the best checkpoint (step {run.step}):")
    if kind == "next-token":
        print(generate(run, "", max_new_tokens=400)[0])
        return
    examples = load_split(run.config, "val", lambda line: None, tokenizer)
    if kind == "prompts":
        for prompt, *responses in before_and_after(run, examples, 3):
            print(prompt, *(f"  {text}" for text in responses), sep="\n")
        return
    if kind == "preferences" and run.config.dpo:
        prompt = tokenizer.decode(examples.texts[0][: examples.prompts_N[0]])
        print(prompt + generate(run, prompt, max_new_tokens=100)[0])
        return
    if kind == "preferences":
        texts = examples.texts.select(np.arange(2 * len(examples)) < 6)
        for row, reward in enumerate(score_texts(run, texts)):
            response = tokenizer.decode(texts[row][examples.prompts_N[row // 2] :])
            name = ("chosen", "rejected")[row % 2]
            print(f"{name}\t{reward:.4f}\t{' '.join(response.split())[:60]}")
        return
    if kind == "conversations":
        user, end = map(tokenizer.special_id, ("<|user|>", END_OF_TURN))
        first = examples.tokens[(examples.tokens == user).argmax() + 1 :]
        text = tokenizer.decode(first[: (first == end).argmax()])
        message, sampling = Message("user", text), SamplingConfig()
        print(text, "".join(answer(run, [message], 400, sampling, 1337)), sep="\n")
        return
    first = range(min(3, len(examples)))
    if kind == "classification":
        texts = [tokenizer.decode(examples.texts[i][1:]) for i in first]
        for text, probs in zip(texts, classify(run, texts), strict=True):
            label = require_task(run.config, kind).labels[probs.argmax()]
            print(f"{label}\t{probs.max():.4f}\t{' '.join(text.split())[:60]}")
        return
    sources = [tokenizer.decode(examples.sources[i][:-1]) for i in first]
    for i, text in enumerate(translate(run, sources)):
        target = tokenizer.decode(examples.targets[i][:-1])
        print(f"{sources[i]}\t{text}\t(reference: {target})")


def train(config: Config, run_dir: Path, *, resume: bool, overwrite: bool) -> int:
    """Trains the model; returns the number of the signal that stopped it, or 0."""
    check_installed(config.train.log_to)
    with claim_run(run_dir, resume=resume, overwrite=overwrite):
        processes.check_same_settings((config, resume, overwrite))
        resuming = resume and has_run(run_dir)  # False if killed before save_config
        tokenizer = resumed_tokenizer(run_dir, config) if resuming else None
        config = with_reference(config)
        corpus, config = load_corpus(config, log_line, tokenizer)
        processes.check_same_settings(config)
        mesh = make_mesh(config, log_line)
        schedule = with_steps_per_call(config, mesh).train
        if isinstance(corpus.train, Examples):
            lengths = np.unique(corpus.train.buckets(config.model.block_size)).tolist()
            log_line(
                f"batches have {', '.join(map(str, lengths))} tokens a row; a program "
                "for each compiles"
            )
        model = build_model(config.model, platform_of(mesh))
        if config.dpo:
            reference = load_initial_params(config, mesh)
            add = partial(evaluation.with_log_probs, model, reference, config, mesh)
            pairs = add(corpus.train), add(corpus.val)
            corpus = dataclasses.replace(corpus, train=pairs[0], val=pairs[1])
        pack = partial(as_rows, config=config, tokenizer=corpus.tokenizer, log=log_line)
        train_rows = [*map(pack, corpus.parts)] or pack(corpus.train)
        val = pack(corpus.val)
        make = partial(make_objective, settings=config.dpo)
        objective, source = make(model), training_source(train_rows, config)
        sources = {"train": evaluation_source(train_rows, config)}
        sources["val"] = evaluation_source(val, config)
        abstract = abstract_state(model, config, mesh)
        diagnosed = on_prompts if config.rewarded else make
        if config.rewarded:
            settings = config, mesh, abstract, corpus.tokenizer, corpus.train, log_line
            config, train_program, eval_step = prepare_rewarded(model, *settings)
        else:
            train_program = make_train_program(objective, config, mesh, abstract)
            eval_step = evaluation.make_eval_step(objective, mesh)
        estimate = partial(evaluation.estimate, eval_step)

        def read(step: int) -> Batch:
            """The batches of the dispatch after `step` updates."""
            steps = range(step, step + steps_in_next_call(step, schedule))
            return read_batches(source, steps, config.data.batch_size, mesh)

        folder, last_step = run_dir / checkpoint.CHECKPOINTS, config.train.max_steps
        found = checkpoint.saved_steps(folder)[-1:] if resume else []
        if (step := max(found, default=0)) < last_step:
            train_program(read(step))  # compiles while other programs do, or run
        eval_batches = evaluation.read_evaluation(sources, config, mesh)

        resumed_step = None
        if found:
            state = checkpoint.restore_state(folder, "latest", abstract, resume=True)
            check_skipped(state, config)
            resumed_step = int(state.step)
            log_line(f"resuming {run_dir} from step {resumed_step}")
        else:
            state = create_state(model, config, mesh, load_initial_params(config, mesh))
            if resume:
                log_line(f"{run_dir} has no checkpoint; starting at step 0")
        if not resume:
            clear_run(run_dir)  # only once the new run can start
        step = resumed_step or 0
        saved, skipped = resumed_step, int(state.skipped)
        if step > last_step:
            raise ValueError(
                f"max_steps={last_step}, but the run has made {step} steps; raise "
                "--train.max-steps"
            )
        save_config(run_dir, config, corpus.tokenizer)

        with (
            checkpoint.open_checkpoints(folder) as checkpoints,
            Monitor(run_dir, config, resumed_step, STARTED, skipped) as monitor,
            diagnose_non_finite(lambda: state, diagnosed, source, config, mesh),
            profiled(run_dir / PROFILE, config.train.profile) as profile_dispatch,
        ):

            def evaluate() -> dict[str, float]:
                """Estimates the losses on both splits, and shows progress."""
                advance = monitor.evaluating(len(sources) * config.train.eval_iters)
                return estimate(state.params, eval_batches, advance)

            def save() -> None:
                """Saves a checkpoint, after checking that the loss is finite."""
                monitor.flush()
                first = {"val": itertools.islice(eval_batches["val"], 1)}
                check_finite(step, estimate(state.params, first))
                checkpoint.save_state(checkpoints, state, None)

            with exits.deferred_interrupts() as pending_signal:
                agree = processes.make_agree()
                if resumed_step is None:
                    monitor.eval(0, evaluate())
                while not (signal := agree(pending_signal())) and step < last_step:
                    batches = read(step)
                    program = train_program(batches)
                    if not program.done():
                        monitor.flush()  # so that no step's time includes compilation
                        monitor.show("compiling")
                    run_steps = program.result()
                    started = time.monotonic()
                    state, metrics = run_steps(state, batches)
                    monitor.train(step, metrics, started)
                    profile_dispatch(metrics)
                    saved = checkpoint.check_saves(checkpoints, saved)
                    step += len(metrics["loss"])

                    if step % config.train.eval_interval == 0 or step == last_step:
                        monitor.flush()
                        monitor.eval(step, eval_metrics := evaluate())
                        metric = eval_metrics[validation_metric(objective)]
                        checkpoint.save_state(checkpoints, state, metric)
                    elif step % config.train.checkpoint_interval == 0:
                        save()

                if signal:
                    if checkpoints.latest_step() != step:
                        save()
                    return signal

            measure = evaluation.exact_loss(model, eval_step, val, config, mesh)

            def exact_loss(name: str, params: Any) -> float:
                """The loss on the whole validation split."""
                with monitor.last_evaluation(name, predictions(val)) as advance:
                    return measure(params, advance)

            state = dataclasses.replace(state, opt_state=None)  # frees memory
            exact = {step: exact_loss("last step", state.params)}
            best_step, params = checkpoint.best_parameters(checkpoints, state)
            if best_step not in (None, step):
                exact[best_step] = exact_loss("best checkpoint", params)
            monitor.done(step, exact, best_step)
            return 0


if __name__ == "__main__":
    with exits.plain_errors():
        main()
