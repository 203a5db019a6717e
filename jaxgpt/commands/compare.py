"""JAX beside PyTorch: the same weights, the same batches, every difference."""

import dataclasses
import math
from json import dumps
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import FlagCreatePairsOff

from jaxgpt.config import GPTConfig
from jaxgpt.files import log_line
from jaxgpt.interop import torch_parity
from jaxgpt.interop.huggingface import find_model, read_huggingface
from jaxgpt.interop.nanogpt import read_nanogpt
from jaxgpt.interop.torch_parity import Check
from jaxgpt.run import load_run

RANDOM = GPTConfig(
    block_size=64,
    vocab_size=1000,
    n_layer=4,
    n_head=4,
    n_embd=128,
    bias=True,
    gelu="tanh",
)


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
    """Runs the same weights in JAX and in PyTorch, and compares every number.

    The weights are those of --hf, --nanogpt or --run-dir, or else a random GPT-2's. The
    exit status is 0 if all that is judged is within its tolerance, and 1 if not. For a
    model of GPT-2's size give few --steps and --greedy-tokens, and a --length.

    Args:
        hf: directory of Hugging Face's GPT-2, or its name on the hub
        nanogpt: ckpt.pt of nanoGPT
        run_dir: as train.py --out-dir made it
        checkpoint: of --run-dir: best (lowest val loss), latest, or a step
        steps: AdamW updates, with warmup, decay and clipping; 0 makes none
        batch_size: rows of each batch, of random tokens
        length: tokens of each row; block_size if left out
        greedy_tokens: tokens that both write; 3 x block_size if left out, 0 for none
        seed: of the random weights and tokens
        json: print one JSON object
    """
    if sum(source is not None for source in (hf, nanogpt, run_dir)) > 1:
        raise ValueError("--hf, --nanogpt and --run-dir exclude each other; choose one")
    if checkpoint != "best" and run_dir is None:
        raise ValueError(f"--checkpoint {checkpoint} is one of --run-dir's; give that")
    name, config, params, reference = _both_sides(
        hf, nanogpt, run_dir, checkpoint, seed
    )
    log_line(f"comparing {name} with transformers' GPT-2, in float32")
    checks: list[Check] = []
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
        report = {
            "source": name,
            "passed": not failed,
            "checks": [
                {
                    name: _plain(value)
                    for name, value in dataclasses.asdict(check).items()
                }
                | {"passed": check.passed}
                for check in checks
            ],
        }
        print(dumps(report))
    else:
        Console().print(table(checks))
        print(f"{len(checks) - len(failed)} of {len(checks)} within tolerance")
    return int(bool(failed))


def _plain(value: Any) -> Any:
    """The value as JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(checks: list[Check]) -> Table:
    """The checks as a table for the terminal."""
    shown = Table(title="How far JAX and PyTorch differ")
    shown.add_column(no_wrap=True)
    for heading in ("largest", "relative", "judged"):
        shown.add_column(heading, justify="right", no_wrap=True)
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            shown.add_section()
            shown.add_row(f"[bold]{section}")
        verdict = "not judged"
        if check.tolerance is not None:
            sign = "≤" if check.passed else ">"
            verdict = f"{check.error:.1e} {sign} {check.tolerance:.2g}"
        shown.add_row(
            f"  {check.name.removeprefix('transformer.')}",
            f"{check.absolute:.1e}",
            f"{check.relative:.1e}",
            verdict if check.passed else f"[bold red]{verdict}",
        )
    return shown


def _both_sides(
    hf: str | None,
    nanogpt: Path | None,
    run_dir: Path | None,
    checkpoint: str,
    seed: int,
) -> tuple[str, GPTConfig, Any, Any]:
    """What is compared: its name, our config and parameters, and PyTorch's model."""
    if hf is not None:
        folder = find_model(hf)
        config, params = read_huggingface(folder)
        return hf, config, params, torch_parity.gpt2_of_directory(folder)
    if nanogpt is not None:
        whole, state, _ = read_nanogpt(nanogpt, log_line)
        config = whole.model
        reference = torch_parity.gpt2_of_nanogpt(config, nanogpt)
        return str(nanogpt), config, state.params, reference
    if run_dir is not None:
        run = load_run(run_dir, checkpoint)
        config = run.config.model
        reference = torch_parity.gpt2_of_params(config, run.params)
        return f"{run_dir}, step {run.step}", config, run.params, reference
    params, reference = torch_parity.random_gpt2(RANDOM, seed)
    return f"a random GPT-2 of seed {seed}", RANDOM, params, reference
