"""Imports PyTorch weights as a run, and exports a run for PyTorch."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
from tyro.conf import FlagCreatePairsOff, Positional, arg

from jaxgpt.config import Config
from jaxgpt.files import temporary
from jaxgpt.interop import encoder_export, huggingface, nanogpt
from jaxgpt.parallel.mesh import host_mesh
from jaxgpt.run import (
    TOKENIZER,
    claim_run,
    clear_run,
    load_run,
    load_state,
    save_config,
    saved_tokenizer,
    text_tokenizer,
)
from jaxgpt.terminal import log_line
from jaxgpt.text import pretrained, tinyshakespeare
from jaxgpt.text.conversations import is_chat_tokenizer
from jaxgpt.text.tokenizer import CharTokenizer, Tokenizer, fits
from jaxgpt.training.checkpoint import CHECKPOINTS, open_checkpoints, save_state
from jaxgpt.training.step import TrainState

Format = Literal["nanogpt", "huggingface"]


def import_(
    format: Positional[Format],
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    meta: Path | None = None,
    tokenizer: str | None = None,
    overwrite: FlagCreatePairsOff[bool] = False,
) -> int:
    """Imports PyTorch weights as a run, to sample from, evaluate and train further.

    Args:
        format: format of the weights
        source: ckpt.pt, or the directory or hub name of a Hugging Face GPT-2
        run_dir: run directory to create
        meta: meta.pkl of nanoGPT's data directory, with the character vocabulary
        tokenizer: gpt2, or a path to a saved tokenizer, for weights that have none
        overwrite: replace the run in run-dir
    """
    if meta and tokenizer:
        raise ValueError("give only one of --meta and --tokenizer")
    if format == "nanogpt":
        config, state, val_loss = nanogpt.read_nanogpt(Path(source), log_line)
    else:
        folder = huggingface.find_model(source)
        model, params = huggingface.read_huggingface(folder)
        config, val_loss = Config(model=model), None
        state = TrainState(jnp.zeros((), jnp.int32), params, None)
    found: Tokenizer | None = None
    if meta:
        found = pretrained.load_nanogpt_meta(meta)
    elif tokenizer:
        found = pretrained.find_tokenizer(tokenizer, log_line)
    elif format == "huggingface":
        try:
            found = huggingface.read_tokenizer(folder)
        except ValueError as error:
            raise ValueError(f"{error}; give another with --tokenizer") from error
    vocab_size = config.model.require_vocab_size()
    if found and not fits(found, vocab_size):
        raise ValueError(
            f"the tokenizer has {found.vocab_size} tokens, but the embedding table has "
            f"{vocab_size} rows; give the tokenizer that the model was trained with"
        )
    if found:
        tokenizer_path = str(run_dir.resolve() / TOKENIZER)
        data = dataclasses.replace(config.data, tokenizer=tokenizer_path)
        if is_chat_tokenizer(found):  # so prompts and texts are read as in training
            data = dataclasses.replace(data, packing="conversations", corpus="chitchat")
        config = dataclasses.replace(config, data=data)
    with claim_run(run_dir, resume=False, overwrite=overwrite):
        with temporary(run_dir / "import") as tmp_path:
            with open_checkpoints(tmp_path) as checkpoints:
                save_state(checkpoints, state, val_loss)
            clear_run(run_dir)  # only once the new one is complete
            tmp_path.rename(run_dir / CHECKPOINTS)
        save_config(run_dir, config, found)
    if not found:
        log_line(
            "the run has no tokenizer, so it can't read or write text; import it again "
            "with --meta meta.pkl, --tokenizer gpt2 or --tokenizer DIR"
        )
    print(run_dir)
    return 0


def export(
    format: Positional[Format],
    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR")],
    target: Annotated[Positional[Path], arg(metavar="TARGET")],
    checkpoint: str = "best",
    dataset: str | None = None,
    overwrite: FlagCreatePairsOff[bool] = False,
) -> int:
    """Exports a run's model for nanoGPT or transformers to load.

    Args:
        format: format to write
        run_dir: run directory written by train.py
        target: ckpt.pt for nanoGPT, or a directory for Hugging Face
        checkpoint: best (lowest val loss), latest, or a step
        dataset: name of nanoGPT's data directory; the run's name by default
        overwrite: replace the target
    """
    if dataset and format == "huggingface":
        raise ValueError("--dataset applies only to nanogpt; leave it out")
    if (target / CHECKPOINTS).exists():
        raise FileExistsError(f"{target} is a run; give another directory")
    filled = any(target.iterdir()) if target.is_dir() else target.exists()
    if filled and not overwrite:
        raise FileExistsError(f"{target} already exists; replace it with --overwrite")
    if format == "huggingface":
        run = load_run(run_dir, checkpoint, host_mesh())
        model = run.config.model
        if model.task == "next-token":
            huggingface.write_huggingface(target, model, run.params, run.tokenizer)
        else:
            tokenizer = text_tokenizer(run)
            encoder_export.write_encoder(target, model, run.params, tokenizer)
    else:
        _export_nanogpt(run_dir, checkpoint, target, dataset, overwrite)
    print(target)
    return 0


def _export_nanogpt(
    run_dir: Path, checkpoint: str, target: Path, dataset: str | None, overwrite: bool
) -> None:
    """Writes ckpt.pt and, for a character tokenizer, nanoGPT's meta.pkl."""
    config, state, val_loss = load_state(run_dir, checkpoint)
    tokenizer, meta = saved_tokenizer(run_dir), target.with_name("meta.pkl")
    if isinstance(tokenizer, CharTokenizer) and meta.exists() and not overwrite:
        raise FileExistsError(f"{meta} already exists; replace it with --overwrite")
    if not dataset and config.data.sha256 == tinyshakespeare.SHA256:
        dataset = "shakespeare_char"
    dataset = dataset or run_dir.resolve().name
    nanogpt.write_nanogpt(target, config, state, val_loss, dataset)
    if isinstance(tokenizer, CharTokenizer):
        pretrained.save_nanogpt_meta(meta, tokenizer)
        log_line(f"for nanoGPT's sample.py, put {meta} into its data/{dataset}/")
    elif tokenizer and tokenizer.vocab_size != pretrained.GPT2_VOCAB_SIZE:
        log_line("nanoGPT's sample.py can't read this tokenizer, only GPT-2's")
    if getattr(config.model, "gelu", "exact") == "tanh":
        log_line(
            "nanoGPT uses the exact GELU, not this model's tanh: logits will differ"
        )
