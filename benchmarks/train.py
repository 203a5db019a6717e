"""Training compared with PyTorch: tokens/s, memory, and FLOP/s relative to a matmul.

python -m benchmarks.train [--shapes NAME ...] [--rounds N] [--contenders PART ...]

Each contender runs in its own process (benchmarks/rounds.py), on the CPU or, with
--device gpu, on one GPU:
- jaxgpt, as train.py runs it: its devices, its mesh, its compiled train steps, with
  float32 or bfloat16 activations.
- torch: benchmarks/torch_gpt.py, exactly the same architecture.
- transformers: its GPT-2, which differs in what can't be configured: it has biases, and
  GPT-2's own GELU (the tanh approximation).
Both PyTorch models use scaled_dot_product_attention, AdamW (fused, which is fastest) at
a constant learning rate, and clipping, eagerly or with torch.compile (forward, loss and
backward), in float32 or bfloat16 autocast.

A round is as many updates as take about --seconds, on batches that are in memory before
the clock starts; the loss is read once, at the end. Peak memory is that of the process,
including its libraries and compilation, or on a GPU that of all its arrays. Writes
benchmarks/train.json.

B batch   T time   N batches, used in a cycle
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
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

# Libraries are imported where they are measured, to keep others' memory free of them.

OURS = ("jaxgpt float32", "jaxgpt bfloat16")
THEIRS = tuple(  # likely fastest first, in case memory runs out
    f"{library} {mode} {dtype}"
    for library in ("torch", "transformers")
    for dtype in ("float32", "bfloat16")
    for mode in ("compile", "eager")
)
CEILINGS = tuple(
    f"ceiling {library} {dtype}"
    for library in ("jax", "torch")
    for dtype in ("float32", "bfloat16")
)
SHAPES = (
    "shakespeare-char-cpu",
    "shakespeare-char",
    "shakespeare-char-no-dropout",
    "gpt2-124m",
)
OUT = Path(__file__).with_suffix(".json")
_PRODUCTS = {
    "cpu": ((2048, 1024, 1024), (1024, 1024, 4096), (2048, 2048, 2048)),
    "gpu": ((4096, 4096, 4096), (8192, 8192, 8192)),
}


@dataclass(frozen=True)
class Arguments:
    """Compares the training speed of jaxgpt and PyTorch, measured in turn."""

    # any of shakespeare-char-cpu, shakespeare-char, shakespeare-char-no-dropout,
    # gpt2-124m, and tiny, which is for the tests
    shapes: tuple[str, ...] = SHAPES
    rounds: int = 5  # rounds per contender, in turn
    seconds: float = 3.0  # approximate length of a round
    contenders: tuple[str, ...] = ()  # only contenders whose names contain one of these
    device: Device = "cpu"
    out: Path = OUT  # the report


def main() -> int:
    """Measures every shape, prints, writes; returns 1 if a contender failed."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.train")
    if unknown := set(arguments.shapes) - {*SHAPES, "tiny"}:
        sys.exit(f"unknown --shapes {', '.join(unknown)}; give {', '.join(SHAPES)}")
    settle(arguments.device)
    report = machine("benchmarks.train", arguments.device) | {
        "rounds": arguments.rounds,
        "ceilings": {},
        "shapes": {},
    }
    run = partial(contend, rounds=arguments.rounds, seconds=arguments.seconds)
    ceilings = report["ceilings"]
    names = wanted((*OURS, *THEIRS), arguments.contenders)
    precisions = {name.split()[-1] for name in names}
    selected = [name for name in CEILINGS if name.split()[-1] in precisions]
    for name, facts in run(selected, {"products": _PRODUCTS[arguments.device]}).items():
        if "rounds" in facts:
            facts["gflops"] = rates(facts, "flops")["highest"] / 1e9
            print(f"{name:28}{facts['gflops']:8.1f} GFLOP/s")
        ceilings[name] = facts
    for shape in arguments.shapes:
        config = shape_config(shape, arguments.device)
        results = run(names, config.to_dict())
        report["shapes"][shape] = judge(config, results, ceilings)
        print_shape(shape, report["shapes"][shape])
        write_json(arguments.out, report)
    judged = [shape["contenders"] for shape in report["shapes"].values()]
    return int(any("failed" in facts for s in judged for facts in s.values()))


def contend(
    names: Iterable[str], config: Facts, *, rounds: int, seconds: float
) -> dict[str, Facts]:
    """Returns the results of these contenders with one config."""
    task = {"config": config, "seconds": seconds}
    tasks = {name: {"contender": name, **task} for name in names}
    return compete("benchmarks.train", tasks, rounds)


def shape_config(shape: str, device: Device = "cpu", rows: int = 0) -> Any:
    """The preset's config, in float32, with the fields that a run would fill in.

    gpt2-124m has a small batch on a CPU, and that of nanoGPT's bench.py on a GPU.

    Args:
      shape: a preset, which "-no-dropout" may follow, or "tiny".
      device: where it is measured.
      rows: replaces the number of rows of a step, if it is not 0.
    """
    from jaxgpt.config import GPTConfig
    from jaxgpt.presets import PRESETS

    name = {"tiny": "smoke"}.get(shape, shape.removesuffix("-no-dropout"))
    config = PRESETS[name]()
    assert isinstance(config.model, GPTConfig)
    model = dataclasses.replace(
        config.model,
        vocab_size=config.model.vocab_size or 65,  # Tiny Shakespeare's characters
        dropout=0.0 if shape.endswith("-no-dropout") else config.model.dropout,
        compute_dtype="float32",
        remat=False,
    )
    data = config.data
    if shape == "gpt2-124m":
        usual_rows, T = (2, 512) if device == "cpu" else (12, 1024)
        model, rows = dataclasses.replace(model, block_size=T), rows or usual_rows
    if rows:
        data = dataclasses.replace(data, batch_size=rows, gradient_accumulation_steps=1)
    steps = config.train.steps_per_call
    if steps == -1:  # chosen for the device; contenders must do the same number
        steps = 25 if shape.startswith("shakespeare-char-cpu") else 1
    train = dataclasses.replace(config.train, steps_per_call=steps)
    return dataclasses.replace(config, model=model, data=data, train=train)


def build(contender: str, config: Facts, seconds: float) -> tuple[Facts, Run]:
    """Returns the facts and the round of a contender, for `compete`."""
    library, *mode, dtype = contender.split()
    if library == "ceiling":
        return build_ceiling(mode[0], dtype, seconds, config["products"])
    if library == "jaxgpt":
        config["model"]["compute_dtype"] = dtype
        update, finish, count, peak = jaxgpt_updates(config)
    else:
        model = torch_model(library, config["model"])
        compiles = mode == ["compile"]
        update, finish, count, peak = torch_updates(model, config, dtype, compiles)

    def run(calls: int) -> dict[str, float]:
        for _ in range(calls):
            update()
        loss = finish()
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        return {"loss": loss, **peak()}

    started = time.perf_counter()
    calls = calls_in(seconds, partial(run, 1))
    tokens = config["data"]["batch_size"] * config["model"]["block_size"]
    facts = {"updates": calls * count, "tokens": calls * count * tokens}
    facts["warm_up_seconds"] = time.perf_counter() - started
    return facts, partial(run, calls)


def batches(config: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Returns random inputs and targets, i32 [N, B, T], equal for all contenders."""
    shape = (
        config["train"]["steps_per_call"],
        config["data"]["batch_size"],
        config["model"]["block_size"] + 1,
    )
    drawn = np.random.default_rng(0).integers(config["model"]["vocab_size"], size=shape)
    tokens = drawn.astype(np.int32)
    return tokens[:, :, :-1], tokens[:, :, 1:]


Peak = Callable[[], dict[str, float]]  # peak GPU memory; empty on a CPU
Updates = tuple[Callable[[], None], Callable[[], float], int, Peak]


def jaxgpt_updates(values: Facts) -> Updates:
    """Functions that update and that wait for the loss, updates per call, and peak."""
    from jaxgpt import start

    start.start()
    import jax

    from jaxgpt.config import Config
    from jaxgpt.models import build_model
    from jaxgpt.parallel.defaults import platform_of
    from jaxgpt.parallel.mesh import batch_sharding, make_mesh
    from jaxgpt.training.objectives import next_token
    from jaxgpt.training.step import create_state, trace_train_steps

    config = Config.from_dict(values)
    count = config.train.steps_per_call
    mesh = make_mesh(config)
    model = build_model(config.model, platform_of(mesh))
    sharded = jax.device_put(batches(values), batch_sharding(mesh, axis=1))
    state, metrics = create_state(model, config, mesh), None
    traced = trace_train_steps(next_token(model), config, mesh, state, sharded)
    train_steps = traced.lower().compile()

    def update() -> None:
        nonlocal state, metrics
        state, metrics = train_steps(state, sharded)

    def finish() -> float:
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"][-1])  # type: ignore[index] # after an update

    return update, finish, count, jax_peak


def jax_peak() -> dict[str, float]:
    """Peak memory of JAX's GPU as `peak_mib`; nothing on a CPU."""
    import jax

    memory = jax.local_devices()[0].memory_stats()
    return {"peak_mib": memory["peak_bytes_in_use"] / 2**20} if memory else {}


def torch_model(library: str, sizes: Facts) -> Any:
    """Our plain PyTorch GPT or transformers' GPT-2, with a model config's sizes."""
    names = ("n_layer", "n_head", "n_embd", "vocab_size")
    same = {name: sizes[name] for name in names}
    dropout = sizes["dropout"]
    if library == "torch":
        from benchmarks.torch_gpt import GPT

        more = {name: sizes[name] for name in ("block_size", "bias")}
        return GPT(**same, **more, dropout=dropout)
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **same,
        n_positions=sizes["block_size"],
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        activation_function="gelu_new",
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,  # generation ends by length alone
    )
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


def torch_updates(model: Any, config: Facts, dtype: str, compiles: bool) -> Updates:
    """The same for a PyTorch model, which makes one update per call."""
    import torch
    from torch.nn import functional
    from torch.nn.utils import clip_grad_norm_

    from benchmarks.torch_gpt import make_adamw

    device = torch_device()
    model.to(device)
    settings = config["optimizer"]
    betas = settings["beta1"], settings["beta2"]
    optimizer = make_adamw(
        model,
        settings["learning_rate"],
        betas,
        settings["weight_decay"],
        fused=True,
    )
    parameters = list(model.parameters())
    inputs, targets = (
        torch.tensor(part, dtype=torch.int64, device=device) for part in batches(config)
    )
    half = torch.autocast(device.type, torch.bfloat16)
    precision = half if dtype == "bfloat16" else nullcontext()

    def loss_of(tokens: Any, targets: Any) -> Any:
        logits = model(tokens)
        if not torch.is_tensor(logits):  # from transformers
            logits = logits.logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    if compiles:
        loss_of = torch.compile(loss_of)
    turns = itertools.cycle(list(zip(inputs, targets, strict=True)))
    loss = torch.zeros(())
    model.train()

    def update() -> None:
        nonlocal loss
        with precision:
            loss = loss_of(*next(turns))
        loss.backward()
        if settings["grad_clip"]:
            clip_grad_norm_(parameters, settings["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()  # frees the gradients while other contenders run

    def peak() -> dict[str, float]:
        if device.type == "cpu":
            return {}
        return {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}

    return update, lambda: loss.item(), 1, peak


def build_ceiling(
    library: str, dtype: str, seconds: float, sizes: list[list[int]]
) -> tuple[Facts, Run]:
    """Repeats the fastest of a few large matmuls."""
    make, multiply = products(library, dtype)
    draw = np.random.default_rng(0).standard_normal
    best: Facts = {"flops": 0}
    for M, K, N in sizes:
        call = partial(multiply, make(draw((M, K))), make(draw((K, N))))
        calls = calls_in(seconds, call)
        if calls * 2 * M * K * N > best["flops"]:
            best = {"flops": calls * 2 * M * K * N, "product": [M, K, N]}
            best_call, best_calls = call, calls

    def run() -> None:
        for _ in range(best_calls):
            best_call()

    return best, run


def products(library: str, dtype: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Functions that make an array, and that multiply two and wait for the result."""
    if library == "torch":
        import torch

        device = torch_device()

        def multiply(a: Any, b: Any) -> None:
            torch.matmul(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize()

        make = partial(torch.tensor, dtype=getattr(torch, dtype), device=device)
        return make, multiply
    import jax
    import jax.numpy as jnp

    matmul = jax.jit(jnp.matmul)
    return partial(jnp.asarray, dtype=dtype), lambda a, b: matmul(
        a, b
    ).block_until_ready()


def judge(config: Any, results: dict[str, Facts], ceilings: dict[str, Facts]) -> Facts:
    """Adds tokens/s, ratios and shares to the results, and compares the best."""
    from jaxgpt.planning.flops import step_flops

    tokens = config.data.batch_size * config.model.block_size
    flops = step_flops(config)
    judged = {
        name: facts | {"tokens_per_second": rates(facts, "tokens")}
        if "rounds" in facts
        else facts
        for name, facts in results.items()
    }
    speeds = {
        name: facts["tokens_per_second"]["median"]
        for name, facts in judged.items()
        if "rounds" in facts
    }
    for name, speed in speeds.items():
        peers = [
            facts["gflops"]
            for ceiling, facts in ceilings.items()
            if ceiling.split()[-1] == name.split()[-1] and "gflops" in facts
        ]
        facts, gflops = judged[name], speed / tokens * flops / 1e9
        facts["gflops"] = gflops
        facts["share_of_ceiling"] = gflops / max(peers) if peers else None
        facts["ratio"] = speeds[OURS[0]] / speed if OURS[0] in speeds else None

    return {
        "config": config.to_dict(),
        "flops_per_update": flops,
        "contenders": judged,
        "best_float32": best_of(speeds, "float32"),
        "best": best_of(speeds, ""),
    }


def best_of(speeds: dict[str, float], precision: str) -> Facts | None:
    """The fastest of each side at a precision (at any, if empty), and their ratio."""
    able = [name for name in speeds if name.endswith(precision)]
    ours = [name for name in able if name in OURS]
    theirs = [name for name in able if name in THEIRS]
    if not (ours and theirs):
        return None
    our, their = (max(side, key=speeds.__getitem__) for side in (ours, theirs))
    return {"ours": our, "theirs": their, "ratio": speeds[our] / speeds[their]}


def print_shape(shape: str, found: Facts) -> None:
    """Prints the contenders as a table, and a line that compares the best."""
    print(f"\n{shape}: {found['flops_per_update'] / 1e9:.1f} GFLOP per update")
    columns = f"{'tokens/s':>10}{'lowest - highest':>20}{'ratio':>7}"
    print(f"{'':30}{columns}{'peak MiB':>10}{'ceiling':>9}")
    for name, facts in found["contenders"].items():
        if "rounds" not in facts:
            print(f"{name:30}{reasons(facts)}")
            continue
        speed = facts["tokens_per_second"]
        spread = f"{speed['lowest']:,.0f} - {speed['highest']:,.0f}"
        print(
            f"{name:30}{speed['median']:10,.0f}{spread:>20}"
            f"{_known(facts['ratio'], '.2f'):>7}{_known(facts['peak_mib'], '.0f'):>10}"
            f"{_known(facts['share_of_ceiling'], '.0%'):>9}"
        )
    lines = (("best_float32", "float32"), ("best", "any precision"))
    compared = [
        f"best of PyTorch at {precision}: {best['theirs']}, ratio of {best['ours']} to "
        f"it: {best['ratio']:.2f}"
        for key, precision in lines
        if (best := found[key])
    ]
    print("; ".join(compared) or "nothing to compare", flush=True)


def _known(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    sys.exit(main())
