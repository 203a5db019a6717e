"""The experiment's stages: trainings by train.py, and what lies between them.

A stage is run once: its result is complete before times.json names it. Stages that use
JAX are processes of their own, since a training needs the accelerator for itself.

N responses
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import exits, start
from jaxgpt.files import replace_file
from jaxgpt.posttrain.rewards import score
from jaxgpt.posttrain.rollout import Rollout, Rules, log_probs, make_rules, respond
from jaxgpt.rlhf_reviews.arms import PRETRAINED, Settings
from jaxgpt.rlhf_reviews.data import (
    PARTS,
    beginnings,
    continuations,
    label_pairs,
    pieces,
    read_lines,
    split_reviews,
    write_lines,
)
from jaxgpt.rlhf_reviews.judges import train_labeller
from jaxgpt.rlhf_reviews.report import write_report
from jaxgpt.run import Run, has_run, load_run, text_tokenizer
from jaxgpt.terminal import log_line
from jaxgpt.text.preferences import encode_prompts
from jaxgpt.training.monitor import read_rows

_TRAIN = Path(__file__).parents[2] / "train.py"
_DATA_SEED = 20260101  # of the preferences and their flips


def run_experiment(
    out: Path,
    settings: Settings,
    reviews: Path,
    seeds: Sequence[int],
    arms: Sequence[str],
) -> None:
    """Runs all stages that are not done.

    Args:
      out: the experiment's folder, an absolute path.
      reviews: JSONL as `find_reviews` returns.
      arms: names of settings.arms to train.

    Raises OSError if a stage fails; its error is on stderr.
    """
    data = out / "data"

    def stage(name: str, work: Callable[[], Any]) -> None:
        if name not in (times := read_times(out)):
            log_line(f"== {name}")
            started = time.monotonic()
            earlier = work() or 0.0
            times[name] = earlier + time.monotonic() - started
            _write_json(out / "times.json", times)

    def train(name: str, flags: str, *files: str | Path) -> None:
        arguments = [*flags.split(), *map(str, files)]
        stage(name, lambda: _train(out / name, arguments))

    def separately(name: str, function: Callable[..., None], *arguments: Any) -> None:
        stage(name, lambda: _in_process(function, out, settings, *arguments))

    stage("data", lambda: write_data(out, settings, reviews))
    train("policy", settings.policy, "--data.path", data / "A.jsonl")
    clips = "--data.path", data / "C-pieces.jsonl"
    train("gold-classifier", settings.gold_classifier, *clips)
    train("gold-lm", settings.gold_lm, "--data.path", data / "C.jsonl")
    separately("beginnings", write_beginnings)
    separately("preferences", write_preferences)
    pairs = "--data.path", data / "preferences.jsonl"

    policy = "--init-from", out / "policy"

    def tune(arm: str, seed: int) -> None:
        folder = f"seed-{seed}"
        flags = f"{settings.arms[arm].flags} --train.seed {seed}"
        if flags.startswith("ppo"):
            flags += f" {settings.response_flags()}"
            files = "--data.path", data / "prompts.jsonl"
            model = "--reward-model", out / folder / "reward"
            train(f"{folder}/{arm}", flags, *policy, *files, *model)
        else:
            train(f"{folder}/{arm}", flags, *policy, *pairs)

    def sample(arm: str, seed: int) -> None:
        separately(f"seed-{seed}/samples/{arm}", write_samples, seed, arm)

    last = [arm for arm in arms if arm == "beta-0"]  # it takes long
    first = [arm for arm in arms if arm not in last]
    for seed in seeds:
        flags = f"{settings.reward} --train.seed {seed}"
        train(f"seed-{seed}/reward", flags, *policy, *pairs)
        for arm in first:
            tune(arm, seed)
        for arm in (PRETRAINED, settings.best_of_name, *first):
            sample(arm, seed)
    for seed in seeds:
        for arm in last:
            tune(arm, seed)
            sample(arm, seed)
    names = [PRETRAINED, settings.best_of_name, *arms]
    _in_process(write_report, out, settings, list(seeds), names)


def read_times(out: Path) -> dict[str, float]:
    """Seconds that each stage took; those that are not done are not in it."""
    path = out / "times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda tmp_path: tmp_path.write_text(text, encoding="utf-8"))


def _train(run_dir: Path, arguments: Sequence[str]) -> float:
    """Trains, or goes on; returns the seconds that an earlier process took."""
    metrics = run_dir / "metrics.jsonl"
    rows = [*read_rows(metrics)] if metrics.exists() else []
    if not any(row["event"] == "done" for row in rows):
        if not _TRAIN.exists():
            raise FileNotFoundError(
                f"there is no {_TRAIN}; run this command in a clone of the repository"
            )
        arguments = ["--resume"] if has_run(run_dir) else arguments
        command = [str(_TRAIN), *arguments, "--out-dir", str(run_dir)]
        log_line(f"python {' '.join(command)}")
        with subprocess.Popen([sys.executable, *command], stdout=2) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # a signal
                process.terminate()  # Popen waits until a checkpoint is saved
                raise
        if status:
            raise ChildProcessError(
                f"the training of {run_dir} ended with status {status}; the same "
                "command goes on where it stopped"
            )
    return max((row.get("elapsed_seconds", 0.0) for row in rows), default=0.0)


def _in_process(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function in a process of its own."""
    process = get_context("spawn").Process(
        target=_child, args=(function, *arguments), daemon=True
    )
    process.start()
    process.join()
    if process.exitcode:
        raise ChildProcessError(
            f"{function.__name__} ended with status {process.exitcode}; the same "
            "command goes on where it stopped"
        )


def _child(function: Callable[..., None], *arguments: Any) -> None:
    with exits.plain_errors():
        start.start()
        function(*arguments)


def write_data(out: Path, settings: Settings, reviews: Path) -> None:
    """Writes A.jsonl to D.jsonl, and the pieces of part C."""
    parts = split_reviews(reviews)
    for part in PARTS:
        write_lines(out / "data" / f"{part}.jsonl", parts[part])
    write_lines(out / "data" / "C-pieces.jsonl", pieces(parts["C"], settings.piece))


def _load_policy(out: Path, settings: Settings) -> tuple[Run, Rules]:
    policy = load_run(out / "policy")
    return policy, make_rules(settings.responses, text_tokenizer(policy))


def write_beginnings(out: Path, settings: Settings) -> None:
    """Writes prompts.jsonl, all of part A, and beginnings.jsonl, of part D.

    A beginning that both parts have is A's alone.
    """
    policy, rules = _load_policy(out, settings)

    def find(part: str) -> list[dict[str, Any]]:
        reviews = read_lines(out / "data" / f"{part}.jsonl")
        return beginnings(reviews, text_tokenizer(policy), rules, settings.beginning)

    trained_on = find("A")
    known = {row["prompt"] for row in trained_on}
    judged = [row for row in find("D") if row["prompt"] not in known]
    if len(judged) < settings.evaluated:
        raise ValueError(
            f"part D has {len(judged)} beginnings that part A lacks, fewer than "
            f"{settings.evaluated}; give more reviews"
        )
    write_lines(out / "data" / "prompts.jsonl", trained_on)
    write_lines(out / "data" / "beginnings.jsonl", judged[: settings.evaluated])


def write_preferences(out: Path, settings: Settings) -> None:
    """Writes preferences.jsonl: continuations of part A's beginnings, labelled."""
    policy, rules = _load_policy(out, settings)
    labeller = train_labeller(read_lines(out / "data" / "B.jsonl"))
    tokenizer = text_tokenizer(policy)
    prompts = [row["prompt"] for row in read_lines(out / "data" / "prompts.jsonl")]
    prompts = [prompts[n % len(prompts)] for n in range(settings.pairs)]
    twice = [prompt for prompt in prompts for _ in range(2)]
    ids = encode_prompts(tokenizer, policy.config, twice)
    texts = continuations(respond(policy, ids, rules, _DATA_SEED), tokenizer)
    whole = [prompt + text for prompt, text in zip(twice, texts, strict=True)]
    logits_N2 = labeller.positive_logits(whole).reshape(-1, 2)
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    rows = label_pairs(prompts, pairs, logits_N2, settings.flipped, _DATA_SEED)
    write_lines(out / "data" / "preferences.jsonl", rows)


def write_samples(out: Path, settings: Settings, seed: int, arm: str) -> None:
    """Writes an arm's continuations of part D's beginnings.

    All arms of a seed draw with the same keys. The log-probabilities are of the whole
    continuation, in nats; best-of-n's are those of the policy.
    """
    policy, rules = _load_policy(out, settings)
    tokenizer, run = text_tokenizer(policy), policy
    folder = out / f"seed-{seed}"
    reward_model, n = load_run(folder / "reward"), 1
    if arm in settings.arms:
        run = load_run(folder / arm, settings.arms[arm].checkpoint)
    elif arm == settings.best_of_name:
        n = settings.best_of
    prompts = [row["prompt"] for row in read_lines(out / "data" / "beginnings.jsonl")]
    ids = encode_prompts(tokenizer, policy.config, prompts)
    rolled = respond(run, [p for p in ids for _ in range(n)], rules, seed)
    scores_N = score(reward_model, rolled)
    best_N = scores_N.reshape(-1, n).argmax(axis=1) + n * np.arange(len(prompts))
    columns = rolled.tokens_BT, rolled.prompts_B, rolled.counts_B, rolled.ended_B
    rolled = Rollout(*(column[best_N] for column in columns))
    reference_N = log_probs(policy, rolled, rules).sum(axis=1)
    log_probs_N = reference_N
    if run is not policy:
        log_probs_N = log_probs(run, rolled, rules).sum(axis=1)
    names = "prompt", "text", "tokens", "ended", "log_prob", "reference_log_prob"
    values = zip(
        prompts,
        continuations(rolled, tokenizer),
        rolled.counts_B.tolist(),
        rolled.ended_B.tolist(),
        log_probs_N.tolist(),
        reference_N.tolist(),
        scores_N[best_N].tolist(),
        strict=True,
    )
    rows = [dict(zip((*names, "score"), row, strict=True)) for row in values]
    write_lines(folder / "samples" / f"{arm}.jsonl", rows)
