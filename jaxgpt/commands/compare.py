"""Compares JAX with PyTorch, given the same weights and batches."""

import dataclasses
import math
from itertools import groupby
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff

from jaxgpt.config import GPTConfig
from jaxgpt.interop import huggingface, torch_models, torch_parity
from jaxgpt.interop.nanogpt import read_nanogpt
from jaxgpt.interop.state_dict import check_gpt
from jaxgpt.run import load_run
from jaxgpt.terminal import log_line

RANDOM = GPTConfig(block_size=64, vocab_size=1000, bias=True, gelu="tanh")


def compare(
    hf: str | None = None,
    nanogpt: Path | None = None,
    run_dir: Path | None = None,
    checkpoint: str = "best",
    steps: int = 50,
    batch_size: int = 4,
    length: int | None = None,
    greedy_tokens: int | None = None,
    seed: int = 1337,
    json: FlagCreatePairsOff[bool] = False,
) -> int:
    """Runs the same weights in JAX and in PyTorch, and compares the results.

    The weights are those of --hf, --nanogpt or --run-dir, by default of a random GPT-2.
    PyTorch's model is transformers' GPT-2 for a GPT, and torch.nn's Transformer for an
    encoder or an encoder-decoder, with random texts of unequal lengths.
    The exit status is 0 if everything judged is within its tolerance, and 1 if not. For
    a model of GPT-2's size, give few --steps and --greedy-tokens, and a --length.

    Args:
        hf: directory of a Hugging Face GPT-2, or its name on the hub
        nanogpt: nanoGPT's ckpt.pt
        run_dir: run directory written by train.py
        checkpoint: checkpoint of --run-dir: best (lowest val loss), latest, or a step
        steps: AdamW updates, with warmup, decay and clipping; 0 for none
        batch_size: rows per batch of random tokens
        length: tokens per row, for a GPT; else the most; block_size by default
        greedy_tokens: tokens that a GPT decodes; 3 x block_size by default, 0 for none
        seed: seed of the random weights and tokens
        json: print one JSON object
    """
    if sum(source is not None for source in (hf, nanogpt, run_dir)) > 1:
        raise ValueError("give only one of --hf, --nanogpt and --run-dir")
    if checkpoint != "best" and run_dir is None:
        raise ValueError(f"--checkpoint {checkpoint} needs --run-dir; give both")
    config: torch_models.Comparable
    if hf is not None:
        source, folder = hf, huggingface.find_model(hf)
        config, params = huggingface.read_huggingface(folder)
        reference = torch_models.gpt2_of_directory(config, folder)
    elif nanogpt is not None:
        source, (run_config, state, _) = str(nanogpt), read_nanogpt(nanogpt, log_line)
        config, params = check_gpt(run_config.model, "nanoGPT"), state.params
        reference = torch_models.gpt2_of_nanogpt(config, nanogpt)
    elif run_dir is not None:
        run = load_run(run_dir, checkpoint)
        source = f"{run_dir}, step {run.step}"
        config, params = torch_models.check_comparable(run.config.model), run.params
        reference = torch_models.torch_of_params(config, params)
    else:
        source, config = f"a random GPT-2 (seed {seed})", RANDOM
        params, reference = torch_models.random_gpt2(config, seed)
    log_line(f"comparing {source} with PyTorch, in float32")
    checks: list[torch_parity.Check] = []
    for check in torch_parity.compare(
        config,
        params,
        reference,
        batch_size=batch_size,
        length=length,
        steps=steps,
        new_tokens=greedy_tokens,
        seed=seed,
    ):
        if not checks or checks[-1].section != check.section:
            log_line(f"  {check.section}")
        checks.append(check)
    failed = [check for check in checks if not check.passed]
    if json:
        rows = [_row(check) for check in checks]
        print(dumps({"source": source, "passed": not failed, "checks": rows}))
    else:
        Console().print(_table(checks))
        print(f"{len(checks) - len(failed)} of {len(checks)} within tolerance")
    return int(bool(failed))


def _row(check: torch_parity.Check) -> dict[str, Any]:
    """The check for JSON, which has no NaN or infinity: they become null."""
    row = dataclasses.asdict(check) | {"passed": check.passed}
    nulls = {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return row | dict.fromkeys(nulls)


def _table(checks: list[torch_parity.Check]) -> Table:
    table = Table(title="Differences between JAX and PyTorch")
    table.add_column(no_wrap=True)
    for heading in ("largest", "relative", "judged"):
        table.add_column(heading, justify="right", no_wrap=True)
    for section, group in groupby(checks, lambda check: check.section):
        table.add_section()
        table.add_row(f"[bold]{section}")
        for check in group:
            name, verdict = check.name.removeprefix("transformer."), "not judged"
            if check.tolerance is not None:
                sign = "≤" if check.passed else "[bold red]>"
                verdict = f"{check.error:.1e} {sign} {check.tolerance:.2g}"
            errors = f"{check.absolute:.1e}", f"{check.relative:.1e}"
            table.add_row(f"  {name}", *errors, verdict)
    return table
