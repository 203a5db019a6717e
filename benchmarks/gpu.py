"""What one GPU reaches, beside what it should, in one command.

python -m benchmarks.gpu [--parts PART ...] [--out PATH]

The parts, whose results are written to benchmarks/gpu.json one by one:
- typing: seconds from starting `python train.py shakespeare-char` until an evaluation
  reaches nanoGPT's loss; first with nothing compiled, then with what that has left.
- gpt2-124m with 12 and with 48 rows: training against torch.compile in bfloat16.
- shakespeare-char: training.

Contenders are those of benchmarks.train, each in its own process. Those of jaxgpt begin
with an empty compilation cache, and trace one more round after their last. With 12 rows
and for shakespeare-char, one also evaluates, in turn with training, and another trains
with programs compiled at the usual level of XLA's autotuning.

B batch   T time
"""

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import train
from benchmarks.rounds import (
    ROOT,
    Device,
    Facts,
    Run,
    compete,
    machine,
    rates,
    reasons,
    settle,
    wanted,
    write_json,
)

OURS, THEIRS = "jaxgpt bfloat16", "torch compile bfloat16"
OUT = Path(__file__).with_suffix(".json")
# Dense bfloat16 FLOP/s by `jax.Device.device_kind`, from NVIDIA's data sheets of the
# A100, L4, H100 and H200; those of L4, H100 and H200 give twice this, for sparsity.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H200": 989.5e12,
}
CATEGORIES = {  # of kernels; the first whose pattern is in the name
    "attention": "cudnn|flash|sdpa|fmha|attention",
    "matrix products": "cublas|cutlass|gemm|nvjet|xmma|splitK|matmul",
    "copies": "(?i)memcpy|memset|copy",
    "reductions": "reduce|softmax",
    "concatenations": "concatenate",
    "transpositions": "transpose",
    "slices": "slice",
    "gather and scatter": "gather|scatter",
    "conversions": "convert",
    "other fusions": "fusion|wrapped",
}
_SHOWN = 25  # rows of a table of kernels
_POLL = 0.05  # seconds between looks at metrics.jsonl


@dataclass(frozen=True)
class Arguments:
    """Measures what one GPU reaches in training, and where its time goes."""

    parts: tuple[str, ...] = ()  # only parts whose names contain one of these
    device: Device = "gpu"
    preset: str = "shakespeare-char"  # the one that is typed
    target: float = 1.4697  # the val_loss to reach; by default nanoGPT's
    limit: float = 150.0  # seconds to wait for it
    shape: str = "gpt2-124m"  # the preset that is compared with PyTorch
    rows: tuple[int, ...] = (12, 48)  # of a step of that preset, in turn
    autotune_level: int = 4  # of XLA, to compare with the 0 of jaxgpt.start
    rounds: int = 3  # rounds per contender, in turn
    seconds: float = 1.0  # approximate length of a round
    out: Path = OUT  # the report


def main() -> None:
    """Measures the parts, prints and writes each, and then the table of targets."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.gpu")
    from jaxgpt.presets import PRESETS

    if unknown := {arguments.preset, arguments.shape} - PRESETS.keys():
        sys.exit(f"unknown preset {min(unknown)}; give one of {', '.join(PRESETS)}")
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # ours shall be empty
    typed = dict(os.environ)  # as a user has it, before `settle`
    if arguments.device == "cpu":
        typed["JAX_PLATFORMS"] = "cpu"
    settle(arguments.device)
    preset, shape = arguments.preset, arguments.shape
    parts: dict[str, Callable[[], Facts]] = {
        "typing": partial(time_typing, arguments, typed),
        **{
            f"{shape}, {rows} rows": partial(
                measure_training, shape, arguments, rows, tunes=i == 0, others=(THEIRS,)
            )
            for i, rows in enumerate(arguments.rows)
        },
        preset: partial(measure_training, preset, arguments, tunes=True),
    }
    report = machine("benchmarks.gpu", arguments.device) | {"parts": {}, "targets": []}
    begun = time.perf_counter()
    for name in wanted(parts, arguments.parts):
        print(f"\n{name}", flush=True)
        started = time.perf_counter()
        facts = attempt(parts[name])
        facts["seconds"] = time.perf_counter() - started
        report["parts"][name] = facts
        report["targets"] = targets(report["parts"], arguments)
        report["seconds"] = time.perf_counter() - begun
        for line in lines_of(facts):
            print(line, flush=True)
        write_json(arguments.out, report)
    print(f"\nin {report['seconds']:.0f} s, on {report['machine']['gpu'] or 'a CPU'}:")
    for row in report["targets"]:
        print("{figure:64}{reached:>10}{target:>9}  {verdict}".format(**row))


def attempt(function: Callable[..., Facts], *arguments: Any) -> Facts:
    """Returns the function's facts, or how it `failed`, so that others can go on."""
    try:
        return function(*arguments)
    except Exception as error:
        print(f"failed: {error!r}", file=sys.stderr, flush=True)
        return {"failed": f"{type(error).__name__}: {error}"}


def time_typing(arguments: Arguments, environment: dict[str, str]) -> Facts:
    """Times the command with an empty cache, and again with what is then in it.

    The corpus is in the cache from the beginning.
    """
    from jaxgpt.text.tinyshakespeare import find_text

    text = find_text(lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        cache.mkdir()
        shutil.copy(text, cache)
        environment = environment | {"JAXGPT_CACHE": str(cache)}
        return {
            name: attempt(
                time_to_loss, arguments, Path(folder) / f"run {i}", environment
            )
            for i, name in enumerate(("empty cache", "second run"))
        }


def time_to_loss(
    arguments: Arguments, run_dir: Path, environment: dict[str, str]
) -> Facts:
    """Starts train.py, and stops it when an evaluation reaches the target.

    Returns seconds since the start until the first evaluation, the first training row
    and the target; the last evaluation; what stderr told of compilation; and how it
    `failed` if the target was not reached.
    """
    from jaxgpt.training.monitor import METRICS

    command = ["train.py", arguments.preset, "--out-dir", str(run_dir)]
    found: Facts = {}
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )

        def waits() -> bool:
            late = time.perf_counter() - started > arguments.limit
            return not late and process.poll() is None

        try:
            for row in follow(run_dir / METRICS, waits):
                seconds = time.perf_counter() - started
                found.setdefault(f"first_{row['event']}_seconds", seconds)
                if row["event"] == "eval":
                    found |= {"step": row["step"], "val_loss": row["val_loss"]}
                    if row["val_loss"] <= arguments.target:
                        found["reached_seconds"] = seconds
                        break
        finally:
            ended = process.poll() is not None
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()
        stderr.seek(0)
        told = stderr.read().splitlines()
    found["compilations"] = [line for line in told if "compil" in line.lower()]
    if "reached_seconds" not in found:
        late = f"{arguments.limit:.0f} s were not enough"
        found["failed"] = f"train.py ended: {told[-1:]}" if ended else late
    return found


def follow(path: Path, waits: Callable[[], bool]) -> Iterator[Facts]:
    """Yields the rows of metrics.jsonl as they are written, while `waits()`."""
    from jaxgpt.training.monitor import read_rows

    seen, goes_on = 0, True
    while goes_on:
        goes_on = waits()  # before the rows are read, so that none is missed
        rows = list(read_rows(path))
        yield from rows[seen:]
        seen = len(rows)
        time.sleep(_POLL)


def measure_training(
    shape: str,
    arguments: Arguments,
    rows: int = 0,
    *,
    tunes: bool,
    others: tuple[str, ...] = (),
) -> Facts:
    """Has contenders train a preset in turn; returns facts of each and of the kernels.

    Args:
      shape: the preset.
      arguments: the command's.
      rows: of a step; the preset's if 0.
      tunes: whether one trains at another autotuning level, and ours also evaluates.
      others: contenders of benchmarks.train besides ours.
    """
    task = {
        "config": train.shape_config(shape, arguments.device, rows).to_dict(),
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
    }
    tasks = {OURS: task | {"contender": OURS, "evaluates": tunes}}
    tuned = f"jaxgpt autotuning {arguments.autotune_level}"
    if tunes:
        tasks[tuned] = task | {"contender": OURS}
    tasks |= {name: task | {"contender": name} for name in others}
    level = f"--xla_gpu_autotune_level={arguments.autotune_level}"
    with tempfile.TemporaryDirectory() as folder:
        environments = {name: {"JAXGPT_CACHE": f"{folder}/{name}"} for name in tasks}
        if tunes:
            flags = f"{os.environ.get('XLA_FLAGS', '')} {level}"
            environments[tuned]["XLA_FLAGS"] = flags
        found = compete("benchmarks.gpu", tasks, arguments.rounds, environments)
    return {"contenders": judge(found)}


def build(
    contender: str,
    config: Facts,
    seconds: float,
    rounds: int,
    evaluates: bool = False,
) -> tuple[Facts, Run]:
    """The facts and the round of a contender of benchmarks.train, for `compete`.

    One of jaxgpt adds what it took to compile, and the kernels after its last round.
    """
    if not contender.startswith("jaxgpt"):
        return train.build(contender, config, seconds)
    import jax

    compilations: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    facts, train_round = train.build(contender, config, seconds)
    from jaxgpt.config import Config
    from jaxgpt.planning.flops import step_flops

    facts |= {
        "compile_seconds": sum(compilations),
        "device_kind": jax.local_devices()[0].device_kind,
        "flops": facts["updates"] * step_flops(Config.from_dict(config)),
    }
    peak, done = train.jax_peak(), 0  # before an evaluation needs memory
    evaluation: Facts = {}
    if evaluates:
        evaluation = attempt(build_evaluation, config)
        evaluate = evaluation.pop("run", None)
        facts["evaluation"] = evaluation

    def run() -> dict[str, Any]:
        nonlocal done
        done += 1
        started = time.perf_counter()
        answer: Facts = (train_round() or {}) | peak
        answer["seconds"] = time.perf_counter() - started
        if "tokens" in evaluation:
            started = time.perf_counter()
            evaluate()
            answer["evaluation_seconds"] = time.perf_counter() - started
        if done == rounds:
            answer["kernels"] = attempt(trace_kernels, train_round, facts["updates"])
        return answer

    return facts, run


def build_evaluation(values: Facts) -> Facts:
    """Tokens of an evaluation of random text, as train.py runs it, and its `run`."""
    from jaxgpt.config import Config
    from jaxgpt.models import build_model
    from jaxgpt.parallel.defaults import platform_of
    from jaxgpt.parallel.mesh import make_mesh
    from jaxgpt.text.batches import evaluation_source
    from jaxgpt.training import evaluation
    from jaxgpt.training.objectives import next_token
    from jaxgpt.training.step import create_state

    config = Config.from_dict(values)
    mesh = make_mesh(config)
    model = build_model(config.model, platform_of(mesh))
    params = create_state(model, config, mesh).params
    vocab_size = values["model"]["vocab_size"]
    text = np.random.default_rng(0).integers(vocab_size, size=2**20).astype(np.uint16)
    sources = {"val": evaluation_source(text, config)}
    batches = evaluation.read_evaluation(sources, config, mesh)
    eval_step = evaluation.make_eval_step(next_token(model), mesh)
    run = partial(evaluation.estimate, eval_step, params, batches)
    run()  # compiles
    rows = config.train.eval_iters * config.data.microbatch_size
    return {"tokens": rows * config.model.block_size, "run": run}


def trace_kernels(train_round: Run, updates: int) -> Facts:
    """Traces a round of so many updates; returns its table of kernels."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            train_round()
        (path,) = Path(folder).rglob("*.xplane.pb")
        return kernel_table(jax.profiler.ProfileData.from_file(str(path)), updates)


def kernel_table(trace: Any, updates: int) -> Facts:
    """Milliseconds an update of each category and each kernel.

    Kernels are what the streams of a GPU have run; on a CPU, XLA's operations, of which
    some contain others. XLA numbers kernels that have the same name, such as those of
    different layers.

    Args:
      trace: a `jax.profiler.ProfileData`.
      updates: number of updates that it shows.

    Raises ValueError if it has no kernels.
    """
    lines = [(plane, line) for plane in trace.planes for line in plane.lines]
    events = [
        event
        for plane, line in lines
        if plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
        for event in line.events
    ] or [
        event
        for _, line in lines
        for event in line.events
        if "hlo_op" in dict(event.stats)
    ]
    if not events:
        raise ValueError("the trace has no kernels")
    spans = sorted((event.start_ns, event.end_ns) for event in events)
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:  # of several streams, they overlap
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    tables, unnumbered = {}, partial(re.sub, r"([._]\d+)+$", "")
    for table, name_of in (("categories", category), ("kernels", unnumbered)):
        total, calls = Counter[str](), Counter[str]()
        for event in events:
            total[name_of(event.name)] += event.duration_ns
            calls[name_of(event.name)] += 1
        tables[table] = [
            {
                "name": name,
                "ms": nanoseconds / 1e6 / updates,
                "calls": calls[name] / updates,
                "share": nanoseconds / total.total(),
            }
            for name, nanoseconds in total.most_common(_SHOWN)
        ]
    busy, window = (each / 1e6 / updates for each in (busy, end - spans[0][0]))
    return {"busy_ms": busy, "idle_ms": window - busy, **tables}


def category(kernel: str) -> str:
    """The kernel's category; its name without numbers if it is in none."""
    found = (name for name, part in CATEGORIES.items() if re.search(part, kernel))
    return next(found, re.sub(r"[\W_]*\d+", "", kernel))


def judge(found: dict[str, Facts]) -> dict[str, Facts]:
    """Adds speeds, ratios to ours and model FLOPs utilisation to what was measured."""
    for facts in found.values():
        if "rounds" not in facts:
            continue
        facts["tokens_per_second"] = rates(facts, "tokens")
        speed = facts["tokens_per_second"]["median"]
        if "rounds" in found[OURS]:
            ours = found[OURS]["tokens_per_second"]["median"]
            facts["ratio"] = ours / speed
        if "flops" in facts:
            peak = PEAK_FLOPS.get(facts["device_kind"])
            flops = rates(facts, "flops")["median"]
            facts["mfu"] = flops / peak if peak else None
            facts["kernels"] = facts["rounds"][-1].pop("kernels")
        if "tokens" in (evaluation := facts.get("evaluation", {})):
            times = [turn["evaluation_seconds"] for turn in facts["rounds"]]
            evaluation["tokens_per_second"] = evaluation["tokens"] / statistics.median(
                times
            )
            evaluation["ratio"] = evaluation["tokens_per_second"] / speed
    return found


def targets(parts: Facts, arguments: Arguments) -> list[dict[str, str]]:
    """The figures that a GPU is to reach, what it reached, and whether that is enough.

    Args:
      parts: the facts of the parts that have run.
      arguments: the command's.
    """
    preset, shape = arguments.preset, arguments.shape
    rows: list[tuple[str, list[str], str, float]] = [
        (
            f"seconds from typing {preset} to {arguments.target}, {run}",
            ["typing", run, "reached_seconds"],
            "<=",
            limit,
        )
        for run, limit in (("empty cache", 35), ("second run", 20))
    ]
    sizes = [f"{shape}, {count} rows" for count in arguments.rows]
    for size in sizes:
        path = [size, "contenders", THEIRS, "ratio"]
        rows.append((f"{size}, against torch.compile", path, ">=", 1.10))
    for size in sizes[-1:]:
        path = [size, "contenders", OURS, "mfu"]
        rows.append((f"{size}, MFU", path, ">=", 0.47))
    for size in (preset, *sizes[:1]):
        path = [size, "contenders", OURS, "evaluation", "ratio"]
        rows.append((f"{size}, evaluation against training", path, ">=", 2.5))
    found = []
    for figure, path, sign, target in rows:
        reached = look_up(parts, path)
        if known := isinstance(reached, float):
            met = reached <= target if sign == "<=" else reached >= target
        found.append(
            {
                "figure": figure,
                "reached": f"{reached:.3g}" if known else "-",
                "target": f"{sign} {target:g}",
                "verdict": ("met" if met else "missed") if known else reached,
            }
        )
    return found


def look_up(facts: Any, path: list[str]) -> Any:
    """What is at a path of keys, or a string that says why there is nothing."""
    for key in path:
        if why := {how: facts[how] for how in ("failed", "left_out") if how in facts}:
            return reasons(why)
        if key not in facts:
            return "not measured"
        facts = facts[key]
    return "unknown" if facts is None else facts


def lines_of(facts: Facts) -> Iterator[str]:
    """Yields the lines that show a part."""
    for name, found in facts.get("contenders", {}).items():
        if "rounds" not in found:
            yield f"{name:24}{reasons(found)}"
            continue
        speed, peak = found["tokens_per_second"], found["peak_mib"]
        line = f"{name:24}{speed['median']:12,.0f} tokens/s"
        line += f" ({speed['lowest']:,.0f} - {speed['highest']:,.0f})"
        line += f", {peak:,.0f} MiB" if peak else ""
        line += f", ratio {found['ratio']:.2f}" if "ratio" in found else ""
        line += f", MFU {found['mfu']:.3f}" if found.get("mfu") else ""
        if "compile_seconds" in found:
            line += f", compiled in {found['compile_seconds']:.1f} s"
        yield line
        if evaluation := found.get("evaluation"):
            speed = evaluation.get("tokens_per_second")
            shown = f"{speed:12,.0f} tokens/s" if speed else reasons(evaluation)
            yield f"{'  evaluation':24}{shown}"
    for run in ("empty cache", "second run"):
        if run in facts:
            told = (
                f"{name} {fact:.4g}" if isinstance(fact, float) else f"{name} {fact}"
                for name, fact in facts[run].items()
            )
            yield f"{run}: {', '.join(told)}"
    kernels = facts.get("contenders", {}).get(OURS, {}).get("kernels", {})
    if "categories" in kernels:
        yield f"busy {kernels['busy_ms']:.2f} ms a step, idle {kernels['idle_ms']:.2f}"
        for table in ("categories", "kernels"):
            yield f"{'ms':>9}{'calls':>8}{'share':>7}  {table}"
            for row in kernels[table]:
                figures = "{ms:9.3f}{calls:8.1f}{share:7.1%}  ".format(**row)
                yield figures + row["name"][:70]
    elif kernels:
        yield f"kernels {reasons(kernels)}"


if __name__ == "__main__":
    main()
