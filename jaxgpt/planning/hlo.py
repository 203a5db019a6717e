"""The collectives of a compiled program, parsed from its HLO.

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


class _Operation(NamedTuple):
    shape: str
    opcode: str
    arguments: str
    attributes: str


_Computation = dict[str, _Operation]  # by name; the last one is the result
_Program = dict[str, _Computation]  # by name; the entry computation is ENTRY


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program, and how often each runs.

    Args:
      text: HLO, as returned by `jax.stages.Compiled.as_text`.

    Raises ValueError if the device groups of a collective can't be parsed.
    """
    program = _parse(text)
    found: dict[object, Collective] = {}
    for name, times in _runs(program, "ENTRY", 1):
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


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", text)


def _runs(program: _Program, name: str, times: int) -> Iterator[tuple[str, int]]:
    """Yields the names of a computation and all it calls, and how often each runs."""
    yield name, times
    for operation in program[name].values():
        is_loop = operation.opcode == "while"
        trips = _trips(program, name, operation) if is_loop else 1
        for inner in _names(" ".join(re.findall(_RUN, operation.attributes))):
            yield from _runs(program, inner, times * trips)


def _trips(program: _Program, name: str, loop: _Operation) -> int:
    """Trip count of a loop that counts up to a constant; 1 for other loops."""
    outer, (test,) = program[name], re.findall(r"condition=%([\w.-]+)", loop.attributes)
    *_, compare = program[test].values()
    limit, start = 1, 0
    for operand in _names(compare.arguments):
        counter = program[test][operand]
        if counter.opcode == "constant":
            limit = int(counter.arguments)
        elif index := re.search(r"index=(\d+)", counter.attributes):
            initials = _names(outer[_names(loop.arguments)[0]].arguments)
            initial = outer[initials[int(index[1])]]
            start = int(initial.arguments) if initial.opcode == "constant" else 0
    return max(limit - start, 1)


def _collective(
    operation: _Operation, name: str, computation: _Computation, times: int
) -> Collective:
    kind, group = operation.opcode.removesuffix("-start"), _group(operation)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    operands = _names(operation.arguments)
    shapes = " ".join(computation[operand].shape for operand in operands)
    sizes = [
        math.prod(map(int, filter(None, axes.split(",")))) * int(bits or 8) // 8
        # For example bf16[2,3], f8e4m3fn[4] or pred[]; pred takes 8 bits.
        for bits, axes in re.findall(r"(?:pred|[a-z](\d+)\w*)\[([\d,]*)\]", shapes)
    ]
    whole = sum(sizes) * (group if kind == "all-gather" else 1)
    return Collective(kind, len(sizes), group, whole, times)


def _parse(text: str) -> _Program:
    program: _Program = {}
    for line in text.splitlines():
        if header := re.match(r"(?:(ENTRY) )?%?([\w.-]+) \(.*\{$", line):
            computation = program[header[1] or header[2]] = {}
        elif found := re.match(r" +(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\(", line):
            name, shape, opcode = found.groups()
            arguments, _, attributes = line[found.end() :].partition(")")
            computation[name] = _Operation(shape, opcode, arguments, attributes)
    return program


def _group(operation: _Operation) -> int:
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
