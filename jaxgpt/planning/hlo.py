"""What a compiled program moves, read from its HLO: collectives, and memory traffic.

XLA's own cost analysis counts the body of a loop once, so that a scan over layers or
microbatches hides most of the work. Here it counts as often as it runs.

Source: openxla.org/xla/operation_semantics, for the operations.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_MOVE_NOTHING = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
)
_INNER = (
    "calls",
    "body",
    "branch_computations",
    "true_computation",
    "false_computation",
)


@dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: as HLO names it; an all-reduce of which each device keeps its own part is a
        reduce-scatter.
      tensors: how many it moves at once.
      group: devices that take part in it together.
      tensor_bytes: size of the whole tensors, each time.
      times: how often it runs.
    """

    kind: str
    tensors: int
    group: int
    tensor_bytes: int
    times: int

    @property
    def received_bytes(self) -> float:
        """What each device receives in all, at least.

        Source: Thakur et al. 2005, "Optimization of Collective Communication
        Operations in MPICH".
        """
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}
        return self.times * self.tensor_bytes * share.get(self.kind, others)


@dataclass(frozen=True)
class _Operation:
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    def called(self, *attributes: str) -> list[str]:
        """Computations that the attributes of these names refer to."""
        names = "|".join(attributes)
        found = re.findall(rf"\b(?:{names})=(%\S+|\{{[^}}]*\}})", self.attributes)
        return re.findall(r"%([\w.-]+)", " ".join(found))


_Computation = dict[str, _Operation]  # its last operation is its result


class Program:
    """A compiled program, as each device runs it.

    Args:
      text: as `jax.stages.Compiled.as_text` gives it.
    """

    def __init__(self, text: str):
        self._computations, entry = _parse(text)
        self._runs = list(self._visit(entry, times=1, fused=False))

    def collectives(self) -> list[Collective]:
        """Every transfer between devices."""
        found: dict[object, Collective] = {}
        for name, times, _ in self._runs:
            for key, operation in self._computations[name].items():
                if operation.opcode.removesuffix("-start") in _COLLECTIVES:
                    # One that goes on beside several products is written in each.
                    same = re.findall(
                        r"(?:channel_id|source_target_pairs)=\S+", operation.attributes
                    )
                    same.append(re.sub(r"\{.*?\}", "", operation.shape))
                    found[tuple(same) if same[1:] else key] = self._collective(
                        name, operation, times
                    )
        return list(found.values())

    def hbm_bytes(self) -> int:
        """What operations read from the device's main memory and write to it."""
        return sum(
            times * self._traffic(operation, self._computations[name])
            for name, times, fused in self._runs
            if not fused
            for operation in self._computations[name].values()
        )

    def _visit(
        self, name: str, times: int, fused: bool
    ) -> Iterator[tuple[str, int, bool]]:
        """Computations that run: name, how often, and whether within a fusion."""
        yield name, times, fused
        for operation in self._computations[name].values():
            calls, count = list(_INNER), times
            if operation.opcode == "call":
                calls = ["to_apply"]
            if operation.opcode == "while":
                count *= self._trips(operation, self._computations[name])
            for inner in operation.called(*calls):
                yield from self._visit(
                    inner, count, fused or operation.opcode == "fusion"
                )

    def _trips(self, loop: _Operation, computation: _Computation) -> int:
        """How often a loop runs that counts up to a constant; others count once."""
        if known := re.search(r'"known_trip_count":{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self._computations[loop.called("condition")[0]]
        *_, compare = condition.values()
        limit, start = 1, 0
        for operand in compare.operands:
            counter = condition[operand]
            if counter.opcode == "constant":
                limit = int(counter.arguments)
            elif index := re.search(r"index=(\d+)", counter.attributes):
                initial = computation[loop.operands[0]].operands[int(index[1])]
                first = computation[initial]
                start = int(first.arguments) if first.opcode == "constant" else 0
        return max(limit - start, 1)

    def _collective(self, name: str, operation: _Operation, times: int) -> Collective:
        kind, group = operation.opcode.removesuffix("-start"), _group(operation)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        shapes = [self._computations[name][each].shape for each in operation.operands]
        sizes = [size for shape in shapes for size in _sizes(shape)]
        whole = sum(sizes) * (group if kind == "all-gather" else 1)
        return Collective(kind, len(sizes), group, whole, times)

    def _traffic(self, operation: _Operation, computation: _Computation) -> int:
        if operation.opcode in _MOVE_NOTHING or operation.opcode.endswith("-done"):
            return 0
        read = sum(
            min(
                sum(_sizes(computation[operand].shape, in_hbm=True)),
                self._read(operation, position, computation),
            )
            for position, operand in enumerate(operation.operands)
        )
        if operation.opcode in ("copy-start", "slice-start"):
            return self._transfer(operation, computation)
        written = sum(_sizes(operation.shape, in_hbm=True))
        return read + min(written, self._written(operation, computation))

    def _transfer(self, start: _Operation, computation: _Computation) -> int:
        """Traffic of a copy between memories, whose result is its other half's."""
        (name,) = (name for name, each in computation.items() if each is start)
        shape = next(
            each.shape
            for each in computation.values()
            if each.opcode.endswith("-done") and name in each.operands
        )
        source = computation[start.operands[0]].shape
        from_hbm = bool(_sizes(source, in_hbm=True))
        return sum(_sizes(shape)) * from_hbm + sum(_sizes(shape, in_hbm=True))

    def _read(
        self, operation: _Operation, position: int, computation: _Computation
    ) -> int:
        """Bytes that an operation reads of an operand: of a slice, only that."""
        opcode, operand = operation.opcode, operation.operands[position]
        if position == 0 and opcode in ("dynamic-update-slice", "scatter"):
            return 0
        if position == 0 and opcode in ("dynamic-slice", "slice", "gather"):
            return _sizes(operation.shape)[0]
        if opcode == "fusion":
            inner = self._computations[operation.called("calls")[0]]
            operand = next(
                name
                for name, each in inner.items()
                if each.opcode == "parameter" and each.arguments == str(position)
            )
            return self._read_by_all(operand, inner)
        if opcode == "bitcast":
            name = next(name for name, each in computation.items() if each is operation)
            return self._read_by_all(name, computation)
        return sum(_sizes(computation[operand].shape))

    def _read_by_all(self, operand: str, computation: _Computation) -> int:
        return sum(
            self._read(operation, position, computation)
            for operation in computation.values()
            for position, name in enumerate(operation.operands)
            if name == operand
        )

    def _written(self, operation: _Operation, computation: _Computation) -> int:
        """Bytes that an operation writes: of an update in place, only the update."""
        opcode, operands = operation.opcode, operation.operands
        if opcode == "dynamic-update-slice":
            return sum(_sizes(computation[operands[1]].shape))
        if opcode == "fusion":
            inner = self._computations[operation.called("calls")[0]]
            return self._written(list(inner.values())[-1], inner)
        if opcode in ("tuple", "bitcast"):
            return sum(
                self._written(computation[each], computation) for each in operands
            )
        return sum(_sizes(operation.shape))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """All computations by name, and the name of the one that is run."""
    computations: dict[str, _Computation] = {}
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif found := re.match(r" +(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(", line):
            arguments, _, attributes = line[found.end() :].partition(")")
            computations[name][found[2]] = _Operation(
                found[3], found[4], arguments, attributes
            )
    return computations, entry


def _sizes(shape: str, in_hbm: bool = False) -> list[int]:
    """Bytes of each array of a shape; `in_hbm` leaves out those in memory S(n)."""
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(dtype) // 8
        for dtype, sizes, layout in re.findall(
            r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape
        )
        if not (in_hbm and re.search(r"S\([1-9]", layout))
    ]


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)  # of bf16, s32, f8e4m3fn
    return int(digits[0]) if digits else {"pred": 8}.get(dtype, 0)


def _group(operation: _Operation) -> int:
    """Devices that take part together, in any of the ways that HLO has to write it."""
    attributes = operation.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(tiled[1])
    form = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}"
    if mesh := re.search(form, attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if "source_target_pairs" in attributes:  # a permutation goes by pairs
        return 2
    raise ValueError(f"can't read the groups of {operation.opcode}: {attributes}")
