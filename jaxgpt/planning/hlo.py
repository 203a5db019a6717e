"""The operations of a compiled program, parsed from its HLO, and its collectives.

Source: openxla.org/xla/operation_semantics, for the operations.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_COLLECTIVE = (
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
# Attributes that name the computations an operation runs. A loop's condition is
# omitted, since it has no collectives.
_RUN = r"\b(?:calls|to_apply|body|\w+_computations?)=(%\S+|\{[^}]*\})"


@dataclass(frozen=True)
class Collective:
    """An operation that transfers data between devices."""

    kind: str  # HLO's name, or reduce-scatter if each device keeps a part of the sum
    tensors: int  # tensors transferred at once
    group: int  # devices per group
    tensor_bytes: int  # bytes of the unsharded tensors, each time it runs
    times: int  # how often it runs

    @property
    def received_bytes(self) -> float:
        """Lower bound on the bytes that each device receives in total.

        Source: Thakur et al. 2005, "Optimization of Collective Communication
        Operations in MPICH".
        """
        others = (self.group - 1) / self.group
        share = {"all-reduce": 2 * others, "collective-permute": 1.0}
        return self.times * self.tensor_bytes * share.get(self.kind, others)


class Operation(NamedTuple):
    """An operation of a program; its name is its key in the computation."""

    shape: str
    opcode: str
    arguments: str
    attributes: str


Computation = dict[str, Operation]  # by name; the last one is the result
Program = dict[str, Computation]  # by name; the entry computation is ENTRY


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program, and how often each runs.

    Args:
      text: HLO, as `parse` takes it.

    Raises ValueError if the device groups of a collective can't be parsed.
    """
    program = parse(text)
    found: dict[object, Collective] = {}
    for name, times in runs(program):
        for key, operation in program[name].items():
            if re.fullmatch(_COLLECTIVE, operation.opcode):
                # A collective that overlaps with several matmuls appears in each.
                same = re.findall(
                    r"(?:channel_id|source_target_pairs)=\S+", operation.attributes
                )
                same.append(re.sub(r"\{.*?\}", "", operation.shape))
                found[tuple(same) if same[1:] else key] = _collective(
                    operation, name, program[name], times
                )
    return list(found.values())


def names(text: str) -> list[str]:
    """The names of operations or computations in arguments or attributes."""
    return re.findall(r"%([\w.-]+)", text)


def arrays(shape: str) -> list[tuple[int, int]]:
    """Numbers of elements and of bytes of each array of a shape or of a tuple's."""
    sizes = [
        (math.prod(map(int, filter(None, axes.split(",")))), int(bits or 8))
        # For example bf16[2,3], f8e4m3fn[4] or pred[]; pred takes 8 bits.
        for bits, axes in re.findall(r"(?:pred|[a-z](\d+)\w*)\[([\d,]*)\]", shape)
    ]
    return [(size, size * bits // 8) for size, bits in sizes]


def runs(
    program: Program, through: str = ".*", name: str = "ENTRY", times: int = 1
) -> Iterator[tuple[str, int]]:
    """Yields the names of a computation and all it calls, and how often each runs.

    Args:
      through: pattern of the operations whose computations are included.
    """
    yield name, times
    for operation in program[name].values():
        if not re.fullmatch(through, operation.opcode):
            continue
        is_loop = operation.opcode == "while"
        trips = _trips(program, name, operation) if is_loop else 1
        for inner in names(" ".join(re.findall(_RUN, operation.attributes))):
            yield from runs(program, through, inner, times * trips)


def _trips(program: Program, name: str, loop: Operation) -> int:
    """Trip count of a loop that counts up to a constant; 1 for other loops."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    outer, (test,) = program[name], re.findall(r"condition=%([\w.-]+)", loop.attributes)
    *_, compare = program[test].values()
    limit, start = 1, 0
    for operand in names(compare.arguments):
        counter = program[test][operand]
        if counter.opcode == "constant":
            limit = int(counter.arguments)
        elif index := re.search(r"index=(\d+)", counter.attributes):
            initials = names(outer[names(loop.arguments)[0]].arguments)
            initial = outer[initials[int(index[1])]]
            start = int(initial.arguments) if initial.opcode == "constant" else 0
    return max(limit - start, 1)


def _collective(
    operation: Operation, name: str, computation: Computation, times: int
) -> Collective:
    kind, group = operation.opcode.removesuffix("-start"), _group(operation)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    operands = names(operation.arguments)
    shapes = " ".join(computation[operand].shape for operand in operands)
    sizes = [size for _, size in arrays(shapes)]
    whole = sum(sizes) * (group if kind == "all-gather" else 1)
    return Collective(kind, len(sizes), group, whole, times)


def parse(text: str) -> Program:
    """Parses HLO, as returned by `jax.stages.Compiled.as_text`."""
    program: Program = {}
    for line in text.splitlines():
        if header := re.match(r"(?:(ENTRY) )?%?([\w.-]+) \(.*\{$", line):
            computation = program[header[1] or header[2]] = {}
        elif found := re.match(r" +(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\(", line):
            name, shape, opcode = found.groups()
            arguments, _, attributes = line[found.end() :].partition(")")
            computation[name] = Operation(shape, opcode, arguments, attributes)
    return program


def _group(operation: Operation) -> int:
    """Number of devices per group, from any of HLO's notations."""
    attributes = operation.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(tiled[1])
    form = r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\)\))? \{(.*?)\}"
    if mesh := re.search(form, attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if "source_target_pairs" in attributes:  # a permute has pairs, not groups
        return 2
    raise ValueError(f"can't read the groups of {operation.opcode}: {attributes}")
