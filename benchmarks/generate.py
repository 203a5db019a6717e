"""Generation compared with PyTorch: tokens/s inside the window and beyond it.

python -m benchmarks.generate [--cases NAME ...] [--rounds N] [--contenders PART ...]

The model has shakespeare-char's sizes (10.8M parameters, a window of 256), random
weights, and float32. All sample at temperature 1 from all tokens. Each contender runs
in its own process (benchmarks/rounds.py), on the CPU or, with --device gpu, on one GPU:
- jaxgpt: `generate_tokens`, up to the last token.
- transformers: `generate` of its GPT-2, with its cache. It can't generate beyond the
  window, so it is left out there.
- torch lecture: the lecture's `generate` (benchmarks/torch_gpt.py), which recomputes
  the whole window for each token.

Beyond the window every contender recomputes the window for each token, which takes
minutes for many rows, so with many rows it starts full and there are fewer new tokens.
Writes benchmarks/generate.json.

B batch   T time (of the prompt)
"""

import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.rounds import (
    Device,
    Facts,
    Run,
    calls_in,
    compete,
    machine,
    rates,
    reasons,
    settle,
    torch_device,
    wanted,
    write_json,
)
from benchmarks.train import shape_config, torch_model

CONTENDERS = ("jaxgpt", "transformers", "torch lecture")
OUT = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Case:
    """A workload: `new` tokens for each of `rows` equal prompts of `prompt` tokens."""

    rows: int
    prompt: int
    new: int


CASES = {
    "inside, 1": Case(rows=1, prompt=16, new=200),
    "inside, 8": Case(rows=8, prompt=16, new=200),
    "inside, 64": Case(rows=64, prompt=16, new=200),
    "beyond, 1": Case(rows=1, prompt=1, new=500),
    "beyond, 8": Case(rows=8, prompt=256, new=32),
    "beyond, 64": Case(rows=64, prompt=256, new=16),
}
LEFT_OUT = {
    ("inside, 64", "torch lecture"): "about 5 minutes per generation",
    **{
        (name, "transformers"): "not supported beyond the window"
        for name in CASES
        if name.startswith("beyond")
    },
}


@dataclass(frozen=True)
class Arguments:
    """Compares the generation speed of jaxgpt and PyTorch, measured in turn."""

    cases: tuple[str, ...] = ()  # only cases whose names contain one, like inside or 64
    rounds: int = 5  # rounds per contender, in turn
    seconds: float = 3.0  # approximate length of a round, at least one generation
    contenders: tuple[str, ...] = ()  # only contenders whose names contain one of these
    device: Device = "cpu"
    out: Path = OUT  # the report


def main() -> int:
    """Measures every case, prints, writes; returns 1 if a contender failed."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.generate")
    settle(arguments.device)
    config = shape_config("shakespeare-char-no-dropout").to_dict()["model"]
    report = machine("benchmarks.generate", arguments.device)
    report |= {"rounds": arguments.rounds, "model": config, "cases": {}}
    for name in wanted(CASES, arguments.cases):
        names = wanted(CONTENDERS, arguments.contenders)
        common = {
            "config": config,
            "case": asdict(CASES[name]),
            "seconds": arguments.seconds,
        }
        tasks = {
            contender: {"contender": contender, **common}
            for contender in names
            if (name, contender) not in LEFT_OUT
        }
        results = compete("benchmarks.generate", tasks, arguments.rounds)
        for contender in names:
            if reason := LEFT_OUT.get((name, contender)):
                results[contender] = {"left_out": reason}
        report["cases"][name] = {
            **asdict(CASES[name]),
            "contenders": judge(results),
        }
        print_case(name, report["cases"][name])
        write_json(arguments.out, report)
    judged = [case["contenders"] for case in report["cases"].values()]
    return int(any("failed" in facts for case in judged for facts in case.values()))


def build(
    contender: str, config: Facts, case: Facts, seconds: float
) -> tuple[Facts, Run]:
    """Returns the facts and the round of a contender, for `compete`."""
    drawn = np.random.default_rng(0).integers(config["vocab_size"], size=case["prompt"])
    prompts_BT = np.tile(drawn, (case["rows"], 1))
    if contender == "jaxgpt":
        once = jaxgpt_generation(config, prompts_BT, case["new"])
    else:
        library = contender.split()[0]
        once = torch_generation(library, config, prompts_BT, case["new"])
    started = time.perf_counter()
    calls = calls_in(seconds, once)
    warm_up = time.perf_counter() - started

    def run() -> dict[str, float] | None:
        found = [once() for _ in range(calls)]
        return found[-1]

    tokens = calls * case["rows"] * case["new"]
    return {"tokens": tokens, "warm_up_seconds": warm_up}, run


def jaxgpt_generation(config: Facts, prompts_BT: np.ndarray, new: int) -> Run:
    """Returns a function that generates once, and times the first tokens."""
    from jaxgpt import start

    start.start()
    import jax

    from jaxgpt.config import GPTConfig, SamplingConfig
    from jaxgpt.generation.decode import generate_tokens
    from jaxgpt.models import build_model
    from jaxgpt.parallel.defaults import platform_of

    model = build_model(GPTConfig(**config), platform_of(jax.devices()[0]))
    tokens_BT = np.zeros((1, 1), np.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens_BT)["params"]
    sampling = SamplingConfig(temperature=1.0)
    prompts = prompts_BT.tolist()

    def once() -> dict[str, float]:
        started = time.perf_counter()
        chunks = generate_tokens(model, params, prompts, new, sampling)
        first, _ = next(chunks)
        seconds = time.perf_counter() - started
        count = first.shape[1] + sum(tokens.shape[1] for tokens, _ in chunks)
        _check_count(count, new)
        return {"first_seconds": seconds, "first_tokens": first.shape[1]}

    return once


def torch_generation(
    library: str, config: Facts, prompts_BT: np.ndarray, new: int
) -> Run:
    """Returns a function that generates once with a PyTorch model."""
    import torch

    device = torch_device()
    model = torch_model(library, config).eval().to(device)
    tokens_BT = torch.tensor(prompts_BT, device=device)
    generate = partial(model.generate, tokens_BT, max_new_tokens=new)
    if library == "transformers":
        generate = partial(
            generate,
            attention_mask=torch.ones_like(tokens_BT),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            use_cache=True,
            pad_token_id=0,  # unused, but avoids a warning
        )

    def once() -> None:
        _check_count(generate().cpu().shape[1] - tokens_BT.shape[1], new)

    return once


def _check_count(count: int, new: int) -> None:
    if count != new:
        raise ValueError(f"generated {count} new tokens instead of {new}")


def judge(results: dict[str, Facts]) -> dict[str, Facts]:
    """Adds tokens/s, and the ratio of ours to it, to each contender's results."""
    judged: dict[str, Facts] = {}
    for name, facts in results.items():
        judged[name] = dict(facts)
        if "rounds" in facts:
            judged[name]["tokens_per_second"] = rates(facts, "tokens")
            if "first_seconds" in facts["rounds"][0]:
                each = [turn["first_seconds"] for turn in facts["rounds"]]
                judged[name]["first_seconds"] = statistics.median(each)
    ours: Any = judged.get(CONTENDERS[0], {}).get("tokens_per_second")
    for facts in judged.values():
        if "rounds" in facts:
            speed = facts["tokens_per_second"]["median"]
            facts["ratio"] = ours["median"] / speed if ours else None
    return judged


def print_case(name: str, found: Facts) -> None:
    """Prints the contenders of one case as a table."""
    tokens = f"{found['rows']} x {found['new']} new tokens after {found['prompt']}"
    print(f"\n{name}: {tokens}")
    columns = f"{'tokens/s':>10}{'lowest - highest':>20}{'ratio':>7}{'peak MiB':>10}"
    print(f"{'':20}{columns}")
    for contender, facts in found["contenders"].items():
        if "rounds" not in facts:
            print(f"{contender:20}{reasons(facts)}")
            continue
        speed = facts["tokens_per_second"]
        spread = f"{speed['lowest']:,.0f} - {speed['highest']:,.0f}"
        ratio, peak = facts["ratio"], facts["peak_mib"]
        line = f"{contender:20}{speed['median']:10,.0f}{spread:>20}"
        line += f"{'-' if ratio is None else f'{ratio:.2f}':>7}"
        line += f"{'-' if peak is None else f'{peak:.0f}':>10}"
        if "first_seconds" in facts:
            line += f"  first tokens after {1000 * facts['first_seconds']:.0f} ms"
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
