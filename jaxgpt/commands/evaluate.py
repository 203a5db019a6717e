"""Evaluates a run on its corpus or on other text or examples."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from jax.sharding import Mesh

from jaxgpt.commands.evaluate_labels import (
    draw_confusion,
    evaluate_labels,
    show_labels,
)
from jaxgpt.commands.evaluate_preferences import (
    evaluate_preferences,
    show_quartiles,
)
from jaxgpt.commands.evaluate_tasks import evaluate_tasks, show_tasks
from jaxgpt.commands.evaluate_translation import evaluate_pairs
from jaxgpt.config import Config, MeshConfig
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.posttrain.iteration import prepare_rewarded
from jaxgpt.run import (
    CONFUSION,
    Run,
    load_config,
    load_run,
    text_tokenizer,
    with_chat_tokens,
    with_reference,
)
from jaxgpt.terminal import log_line, progress
from jaxgpt.text.batches import predictions
from jaxgpt.text.conversations import ANSWER, ANSWER_END
from jaxgpt.text.corpus import load_split
from jaxgpt.text.examples import Examples, Prompts
from jaxgpt.text.packing import PackedDocuments, as_rows
from jaxgpt.text.shards import Tokens
from jaxgpt.text.tasks import kind_of
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.training.evaluation import (
    evaluate_exactly,
    evaluate_examples,
    make_eval_step,
    make_losses_step,
    packed_losses,
    summarize,
)
from jaxgpt.training.objectives import make_objective
from jaxgpt.training.step import abstract_state

_CHUNK = 1 << 22  # tokens counted at once


def evaluate(
    run_dir: Path,
    checkpoint: str = "best",
    split: Literal["train", "val", "test", "all", "auto"] = "auto",
    stride: int | None = None,
    batch_size: int = 16,
    data_path: tuple[str, ...] = (),
    packing: Literal["windows", "documents", "conversations"] | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    json: tyro.conf.FlagCreatePairsOff[bool] = False,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 # it is frozen
) -> int:
    """Reports the exact loss on a text: each token but the first is predicted once.

    A run with --data.packing documents predicts every token, each document on its own.
    Bits per character and per byte of UTF-8 are the loss of all these tokens, divided
    by the characters or bytes they stand for; a token that ends a document adds to the
    loss but is no text.

    Of conversations, it reports the loss of the assistant's text and of its end, per
    token, and per byte of the text alone. A model that has not learned the tokens of
    conversations gets them first, as --init-from does.

    Of a classifier, it reports the loss per example, accuracy, F1, calibration error
    and confusion matrix, which confusion.png in the run directory shows too; of a
    masked language model, the loss and accuracy of the masked tokens. Of an
    encoder-decoder, it reports the loss of the targets and, of the translations, exact
    matches, BLEU and chrF, also of copies of the sources. Of a policy that PPO or GRPO
    trained, it reports beta KL - reward, and both, of its responses to prompts; the
    reward is scaled, and less the penalty for responses without an end, as in training.

    Of an assistant, it reports pass@1 and pass@8 on held-out instructions, and on
    held-out phrasings.

    Of a reward model, or a run that DPO trained, it reports the loss per pair and the
    accuracy, also by quartile of the difference of the two rewards.

    Args:
        run_dir: run directory written by train.py
        checkpoint: best (lowest val loss), latest, or a step
        split: train or val, as for training; test, of examples and conversations; all;
            auto: val, but all if data_path has no tokens, so that a file is scored as a
            whole
        stride: slide windows by N tokens, counting the last N; no overlap by default
        batch_size: windows per batch, over all devices; does not affect the result
        data_path: other text than the run's: files, folders, or folders of tokens
        packing: as --data.packing of train.py; by default the run's; conversations
            without data_path are those of the corpus chitchat
        beams: of the beam search for translations; 4 by default
        length_penalty: of that search; 0.6 by default
        json: print one JSON object
        mesh: mesh of this machine's devices; fsdp and tensor shard the parameters
    """
    config = load_config(run_dir)
    task, architecture = config.model.task, config.model.architecture
    packing = packing or config.data.packing
    learned = dataclasses.replace(config.data, learn_prompts=False)
    data = dataclasses.replace(learned, packing=packing)
    kind = kind_of(dataclasses.replace(config, data=data))
    if kind == "next-token" and split == "test":
        raise ValueError(
            f"--split test is for examples and conversations, but architecture="
            f"{architecture} with packing={packing} reads a text, which has train and "
            "val; use --split val"
        )
    if stride is not None and kind != "next-token":
        raise ValueError(
            f"--stride {stride} is for windows of a text, but architecture="
            f"{architecture} with packing={packing} reads examples; omit it"
        )
    search: dict[str, Any] = {"beams": beams, "length_penalty": length_penalty}
    search = {name: value for name, value in search.items() if value is not None}
    if task != "translation" and search:
        raise ValueError(
            f"--beams and --length-penalty are for translation, but architecture="
            f"{architecture} does not translate; omit them"
        )
    data = dataclasses.replace(
        learned, batch_size=batch_size, gradient_accumulation_steps=1
    )
    if data_path or packing != data.packing:
        data = dataclasses.replace(data, weights=(), sha256="", packing=packing)
    if data_path:
        data = dataclasses.replace(data, path=data_path)
    elif kind == "conversations" and config.data.packing != packing:
        data = dataclasses.replace(data, path=(), corpus="chitchat")
    elif config.data.packing == "conversations" and packing != "conversations":
        raise ValueError(
            f"--packing {packing} is for a text, but the run was trained on "
            "conversations; give a text with --data-path, or omit --packing"
        )
    # Only training has minibatches, groups and a target.
    if config.ppo:
        ppo = dataclasses.replace(config.ppo, minibatches=1, kl_target=0.0)
        config = dataclasses.replace(config, ppo=ppo)
    if config.grpo:
        grpo = dataclasses.replace(config.grpo, minibatches=1, group_size=1)
        config = dataclasses.replace(config, grpo=grpo)
    # The mesh is for this machine's devices, not for those that trained the run.
    config = dataclasses.replace(config, data=data, mesh=mesh)
    devices = make_mesh(config, log_line)
    run = load_run(run_dir, checkpoint, devices)
    if not data.has_tokens:
        text_tokenizer(run)
    if kind == "conversations":
        run = with_chat_tokens(run)
        config = dataclasses.replace(config, model=run.config.model)
    if split == "auto":
        split = "all" if data_path and not data.has_tokens else "val"
    text = ", ".join(data.path) or data.corpus
    part = "all" if split == "all" else f"the {split} split"
    log_line(f"evaluating on {part} of {text}")
    found = load_split(config, split, log_line, run.tokenizer)
    measure: dict[str, Callable[..., dict[str, Any]]] = {
        "next-token": partial(_evaluate_tokens, stride=stride),
        "conversations": _evaluate_answers,
        "prompts": _evaluate_policy,
        "classification": evaluate_labels,
        "translation": partial(evaluate_pairs, **search),
        "preferences": evaluate_preferences,
    }
    of_task = measure.get(kind, _evaluate_examples)
    report = {"split": split, **of_task(run, found, config, devices)}
    is_assistant = (config.data.corpus, config.data.path) == ("assistant", ())
    if is_assistant:
        log_line("answering the instructions")
        report["tasks"] = evaluate_tasks(run, split)
    if json:
        print(dumps(report))
    else:
        for name, value in report.items():
            if not isinstance(value, (dict, list)):
                shown = f"{value:.4f}" if isinstance(value, float) else value
                shown = "unknown" if value is None else shown
                print(f"{name.replace('_', ' '):24}{shown}")
    if is_assistant and not json:
        show_tasks(report["tasks"])
    if kind == "preferences" and not json:
        show_quartiles(report)
    if kind == "classification":
        if not json:
            show_labels(report)
        draw_confusion(report, f"{part} of {text}", run_dir / CONFUSION)
        log_line(f"the confusion matrix is drawn in {run_dir / CONFUSION}")
    return 0


def _evaluate_tokens(
    run: Run, tokens: Tokens, config: Config, mesh: Mesh, stride: int | None
) -> dict[str, Any]:
    """The exact loss of next-token prediction."""
    rows = as_rows(tokens, config, run.tokenizer, log_line)
    eval_step = make_losses_step(run.model, mesh)
    with progress("evaluating", predictions(rows)) as advance:
        result = evaluate_exactly(
            eval_step, run.params, rows, config, mesh, stride, advance
        )
    report = dataclasses.asdict(result)
    report["perplexity"] = math.exp(result.nats_per_token)
    first = len(tokens) - result.tokens  # token that is predicted
    bits = result.tokens * result.nats_per_token / math.log(2)
    sizes = count_text(run.tokenizer, tokens, first) if run.tokenizer else (0, 0)
    for unit, size in zip(("character", "byte"), sizes, strict=True):
        report[f"bits_per_{unit}"] = bits / size if size else None
    return report


def _evaluate_answers(
    run: Run, rows: PackedDocuments, config: Config, mesh: Mesh
) -> dict[str, Any]:
    """The exact loss of the assistant's turns, and of their text alone per byte.

    The standard errors are from the variance between conversations.
    """
    eval_step = make_losses_step(run.model, mesh, summed=False)
    with progress("evaluating", predictions(rows)) as advance:
        losses_RT = packed_losses(eval_step, run.params, rows, config, mesh, advance)
    lengths_R = np.add.reduceat(rows.lengths_P, rows.offsets_R[:-1])
    losses = losses_RT[np.arange(rows.block_size) < lengths_R[:, None]]
    tokenizer = text_tokenizer(run)
    ids = range(tokenizer.vocab_size)
    bytes_V = np.array([len(tokenizer.decode_bytes([id_])) for id_ in ids])
    parts, tokens, of_piece = map(
        np.asarray, (rows.parts, rows.tokens, rows.conversations_P)
    )
    names, conversation_P = np.unique(of_piece, return_inverse=True)
    sums = partial(np.bincount, np.repeat(conversation_P, rows.lengths_P))
    result = summarize(sums(losses), sums(parts > 0))
    is_text = parts == ANSWER
    of_text = summarize(sums(losses * is_text), sums(bytes_V[tokens] * is_text))
    return {
        "conversations": len(names),
        "answers": int((parts == ANSWER_END).sum()),
        **dataclasses.asdict(result),
        "perplexity": math.exp(result.nats_per_token),
        "bytes": of_text.tokens,
        "nats_per_byte": of_text.nats_per_token,
        "standard_error_per_byte": of_text.standard_error,
    }


def _evaluate_policy(
    run: Run, prompts: Prompts, config: Config, mesh: Mesh
) -> dict[str, Any]:
    """Mean loss, reward and divergence of a policy's responses to the prompts."""
    state = abstract_state(run.model, config, mesh)
    settings = with_reference(config), mesh, state, run.tokenizer, prompts, log_line
    *_, eval_step = prepare_rewarded(run.model, *settings)
    with progress("evaluating", len(prompts)) as advance:
        every = eval_step, run.params, prompts, config, mesh, advance
        means = evaluate_examples(*every)
    return {"prompts": int(means.pop("weight")), **means}


def _evaluate_examples(
    run: Run, examples: Examples, config: Config, mesh: Mesh
) -> dict[str, Any]:
    """Mean loss, perplexity and other metrics of the predicted tokens of examples."""
    eval_step = make_eval_step(make_objective(run.model), mesh)
    with progress("evaluating", len(examples)) as advance:
        means = evaluate_examples(
            eval_step, run.params, examples, config, mesh, advance
        )
    loss, tokens = means.pop("loss"), int(means.pop("weight"))
    report = {"examples": len(examples), "tokens": tokens, "nats_per_token": loss}
    return report | {"perplexity": math.exp(loss), **means}


def count_text(
    tokenizer: Tokenizer, tokens: np.ndarray | Tokens, start: int
) -> tuple[int, int]:
    """Counts the characters that begin in the tokens from `start` on, and the bytes.

    An end-of-text token has none.
    """
    counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    for position in range(start, len(tokens), _CHUNK):
        counts_V += np.bincount(
            tokens[position : position + _CHUNK], minlength=len(counts_V)
        )
    if tokenizer.end_of_text is not None:
        counts_V[tokenizer.end_of_text] = 0
    characters = size = 0
    for id_ in np.flatnonzero(counts_V).tolist():
        utf8, count = tokenizer.decode_bytes([id_]), int(counts_V[id_])
        characters += count * sum(byte & 0xC0 != 0x80 for byte in utf8)
        size += count * len(utf8)
    return characters, size
