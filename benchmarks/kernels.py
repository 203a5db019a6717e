"""The GPU kernels of a train step: how often each is launched and the bytes it moves.

python -m benchmarks.kernels [--preset NAME] [--rows N] [--json PATH]

Compiles one update of a preset, without gradient accumulation, for one H100. It needs
`jax[cuda12]`, but no GPU, since nothing runs.

Bytes follow from shapes: those of the arrays, or parts of arrays, that a kernel reads
and writes. Caches may serve some of them. The time is that of the bytes at the
published memory bandwidth. It does not bound matmuls and attention of NVIDIA's
libraries, which are limited by arithmetic, so the total omits them.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import tyro
from jax.experimental import topologies

from benchmarks.rounds import write_json
from jaxgpt.models import build_model
from jaxgpt.parallel.defaults import platform_of
from jaxgpt.parallel.feeding import batch_shapes
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.planning.hlo import Computation, Operation, arrays, names, parse, runs
from jaxgpt.planning.plan import no_compilation_cache
from jaxgpt.presets import PRESETS
from jaxgpt.start import start
from jaxgpt.text.corpus import known_vocab_size
from jaxgpt.training.objectives import next_token
from jaxgpt.training.step import abstract_state, trace_train_steps

BANDWIDTH = 3.35e12  # bytes per second; source: nvidia.com/en-us/data-center/h100
# What XLA needs to know of the device, as an H100 (80 GB, SXM) reports it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
"""
LIBRARIES = {"cublas": "cuBLAS matmul", "cudnn": "cuDNN attention"}
_CALLS = "while|call|conditional"
_NO_KERNEL = f"{_CALLS}|parameter|constant|tuple|get-tuple-element|bitcast|after-all"
# Operations that change a part of their first operand, and which operand is the part.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
_ALL_OPERANDS = ("reduce", "dot", "scatter", "custom-call")  # need all of them


@dataclass(frozen=True)
class Arguments:
    """Lists the kernels of a train step that is compiled for an H100."""

    preset: str = "gpt2-124m"
    rows: int = 12  # sequences of the update, all at once
    json: Path | None = None  # where to write all groups


@dataclass(frozen=True)
class Group:
    """The kernels of a kind, for one JAX operation and with results of one shape."""

    kind: str  # a library, or the operation that XLA named its fusion after
    shape: str
    operation: str  # the end of its name
    launches: int  # per update, like the bytes
    read: int  # bytes
    written: int

    @property
    def milliseconds(self) -> float:
        """The time that memory takes to transfer the bytes."""
        return 1e3 * (self.read + self.written) / BANDWIDTH


def main() -> None:
    """Compiles the step, prints its kernels by kind and the largest groups."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.kernels")
    if arguments.preset not in PRESETS:
        sys.exit(f"unknown --preset {arguments.preset}; give {', '.join(PRESETS)}")
    jax.config.update("jax_platforms", "cpu")  # before JAX starts: looks for no GPU
    start()
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    except NotImplementedError:  # JAX knows no CUDA
        sys.exit('the compiler for GPUs is missing: pip install "jax[cuda12]"')
    found = groups(compiled_step(arguments.preset, arguments.rows, topology.devices))
    kinds = [
        total([group for group in found if group.kind == kind], kind)
        for kind in sorted({group.kind for group in found})
    ]
    others = [group for group in found if group.kind not in LIBRARIES.values()]
    print_table([*kinds, total(others, "all but matmuls and attention")])
    print("\nthe largest groups:")
    print_table(found[:25])
    if arguments.json:
        facts = {"preset": arguments.preset, "rows": arguments.rows}
        facts |= {"jax": jax.__version__, "groups": [asdict(each) for each in found]}
        write_json(arguments.json, facts)


def compiled_step(preset: str, rows: int, devices: list[jax.Device]) -> str:
    """The HLO of a preset's train step with `rows` rows, compiled for the devices."""
    config = PRESETS[preset]()
    vocab_size = config.model.vocab_size or known_vocab_size(config)
    model_config = replace(config.model, vocab_size=vocab_size)
    data = replace(config.data, batch_size=rows, gradient_accumulation_steps=1)
    config = replace(config, model=model_config, data=data)
    mesh = make_mesh(config, devices=devices)
    model = build_model(config.model, platform_of(mesh))
    state, batches = abstract_state(model, config, mesh), batch_shapes(config, mesh, 1)
    traced = trace_train_steps(next_token(model), config, mesh, state, batches)
    with no_compilation_cache():
        return traced.lower().compile().as_text() or ""


def groups(text: str) -> list[Group]:
    """The kernels of a program compiled for a GPU, those that move most bytes first.

    Each branch of a conditional counts as if it ran.
    """
    # cuBLAS and cuDNN return scratch memory as their last result; without its shape:
    scratch = r"[su]8\[\d+\]\{0\}(?=\)| get-tuple-element)"
    program = parse(re.sub(scratch, "()", text))
    found: dict[tuple[str, str, str], list[Group]] = {}
    for computation, times in runs(program, _CALLS):
        for name, operation in program[computation].items():
            if re.fullmatch(_NO_KERNEL, operation.opcode):
                continue
            calls = [operation]
            if operation.opcode == "fusion":
                (fused,) = re.findall(r"calls=%([\w.-]+)", operation.attributes)
                inner = program[fused].values()  # a library call may slice its operands
                calls += [each for each in inner if each.opcode == "custom-call"]
                read, written = fusion_traffic(program[fused])
            else:
                operands = names(operation.arguments)
                read = sum(_bytes(program[computation][each]) for each in operands)
                written = _bytes(operation)
            shape = re.sub(r"\{.*?\}|, \(\)", "", operation.shape)
            op_name = re.search(r'op_name="([^"]*)"', calls[-1].attributes)
            kind = kind_of(name, calls[-1])
            key = (kind, shape, op_name[1][-50:] if op_name else "")
            group = Group(*key, times, times * read, times * written)
            found.setdefault(key, []).append(group)
    summed = (total(parts, *key) for key, parts in found.items())
    return sorted(summed, key=lambda group: -group.milliseconds)


def total(parts: list[Group], kind: str, shape: str = "", operation: str = "") -> Group:
    """The sum of groups, as a group of its own."""
    launches = sum(part.launches for part in parts)
    read = sum(part.read for part in parts)
    written = sum(part.written for part in parts)
    return Group(kind, shape, operation, launches, read, written)


def kind_of(name: str, operation: Operation) -> str:
    """Whose kernel it is, or the operation that XLA named its fusion after."""
    if library := re.search(r'"__(cublas|cudnn)', operation.attributes):
        return LIBRARIES[library[1]]
    if re.search(r'"__(gpu\$xla\.gpu\.)?triton', operation.attributes):
        return "Pallas or Triton"
    if operation.opcode != "fusion":
        return operation.opcode
    main = re.search("concatenate|slice|convert|reduce|transpose", name)
    return f"fusion: {main[0] if main else 'other'}"


def fusion_traffic(fused: Computation) -> tuple[int, int]:
    """Bytes that a fusion reads and writes.

    It reads only the elements that its results need: few of an array that is sliced,
    and of one that is updated in place none but those that a scatter adds to.
    """
    *_, (root, last) = fused.items()
    written, updates = 0, dict[str, Operation]()
    for name in names(last.arguments) if last.opcode == "tuple" else [root]:
        while fused[name].opcode == "bitcast":
            (name,) = names(fused[name].arguments)
        result = fused[name]
        if result.opcode in _UPDATES:
            part = names(result.arguments)[_UPDATES[result.opcode]]
            result = updates[name] = fused[part]
        written += _bytes(result)
    read, needed = 0.0, Counter({root: _elements(last)})
    for name, operation in reversed(fused.items()):
        if operation.opcode == "parameter":
            read += _bytes(operation) * needed[name] / max(1, _elements(operation))
        for position, operand in enumerate(names(operation.arguments)):
            size, elements = _elements(fused[operand]), needed[name]
            if name in updates and position == 0:
                adds = operation.opcode == "scatter"
                elements = _elements(updates[name]) if adds else 0
            elif operation.opcode in _ALL_OPERANDS:
                elements = size
            needed[operand] = min(size, needed[operand] + elements)
    return round(read), written


def _elements(operation: Operation) -> int:
    return sum(elements for elements, _ in arrays(operation.shape))


def _bytes(operation: Operation) -> int:
    return sum(size for _, size in arrays(operation.shape))


def print_table(rows: Iterable[Group]) -> None:
    """Prints groups of kernels, one per line."""
    print(f"{'':30}{'launches':>8}{'MB read':>10}{'written':>10}{'ms':>8}")
    for row in rows:
        ms = "-" if row.kind in LIBRARIES.values() else f"{row.milliseconds:.2f}"
        moved = f"{row.read / 1e6:10,.1f}{row.written / 1e6:10,.1f}{ms:>8}"
        place = f"{row.shape[:60]}  {row.operation}"
        print(f"{row.kind:30}{row.launches:8}{moved}  {place}".rstrip())


if __name__ == "__main__":
    main()
