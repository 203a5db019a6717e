"""The transfers between devices of a compiled program, read from its HLO.

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
# Attributes that name computations which an operation runs. A loop's condition is left
# out, since it moves nothing.
_RUN = r"\b(?:calls|to_apply|body|\w+_computations?)=(%\S+|\{[^}]*\})"


@dataclass(frozen=True)
class Collective:
    """A transfer between devices."""

    kind: str  # as HLO names it, or reduce-scatter where each keeps a part of the sum
    tensors: int  # that it moves at once
    group: int  # devices that take part in it together
    tensor_bytes: int  # size of the whole tensors, each time
    times: int  # how often it runs

    @property
    def received_bytes(self) -> float:
        """What each device receives in all, at least.

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


_Computation = dict[str, _Operation]  # its last operation is its result
_Program = dict[str, _Computation]  # the one that is run is called ENTRY


def collectives(text: str) -> list[Collective]:
    """Every transfer between devices in a compiled program, and how often it runs.

    Args:
      text: as `jax.stages.Compiled.as_text` gives it.

    Raises ValueError where it can't read which devices take part.
    """
    program = _parse(text)
    found: dict[object, Collective] = {}
    for name, times in _runs(program, "ENTRY", 1):
        for key, operation in program[name].items():
            if re.fullmatch(_COLLECTIVE, operation.opcode):
                # One that overlaps with several products is written in each of them.
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
    """A computation and all that it runs: their names, and how often each runs."""
    yield name, times
    for operation in program[name].values():
        loops = operation.opcode == "while"
        trips = _trips(program, name, operation) if loops else 1
        for inner in _names(" ".join(re.findall(_RUN, operation.attributes))):
            yield from _runs(program, inner, times * trips)


def _trips(program: _Program, name: str, loop: _Operation) -> int:
    """How often a loop runs that counts up to a constant; others count once."""
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
        # Of such as bf16[2,3], f8e4m3fn[4] and pred[], which has 8 bits.
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
