"""What a compiled program says of itself: its collectives with the times that they run, and its largest tensor.

XLA's own cost analysis counts the body of a loop once. Here the text of the compiled program is read from its entry
down, and what stands in the body of a loop counts as often as the loop runs, where that is known in the program. Where it
is not (micro-batches, chunks of logits), the caller says it, the outermost loop first.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
DTYPE_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}  # the others carry their bits in their name: f32, s8

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MESHED = re.compile(
    r"replica_groups=@?mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MEGASCALE = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}.*?_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One collective of a program. `bytes` is what a device sends each time, by a ring (both ways for an all-reduce)."""

    kind: str
    bytes: float
    times: int
    groups: tuple[tuple[int, ...], ...]  # of partition numbers; of a permutation, its pairs

    def axes(self, mesh_shape: dict[str, int]) -> tuple[str, ...]:
        """The mesh axes that its groups run along."""
        coordinates = np.array([np.unravel_index(group, tuple(mesh_shape.values())) for group in self._rectangular()])
        varies = (coordinates != coordinates[:, :, :1]).any(axis=(0, 2))
        return tuple(name for name, along in zip(mesh_shape, varies, strict=True) if along)

    def bytes_between_nodes(self, per_node: int) -> float:
        """Of `bytes`, a device's share of what leaves its node of `per_node` partitions.

        A ring over several nodes enters and leaves each once; the members in a node carry that together, as the rings
        of a collective library do.
        """
        nodes = [[member // per_node for member in group] for group in self.groups]
        if all(len(set(group)) == 1 for group in nodes):
            return 0.0
        size, together = len(nodes[0]), max(group.count(node) for group in nodes for node in group)
        if self.kind == "all-to-all":
            return self.bytes * (size - together) / (size - 1)
        return self.bytes if self.kind == "collective-permute" else self.bytes / together

    def _rectangular(self) -> list[tuple[int, ...]]:
        size = max(map(len, self.groups))
        return [group + group[:1] * (size - len(group)) for group in self.groups]


@dataclass(frozen=True)
class Facts:
    collectives: tuple[Collective, ...]
    largest_bytes: int  # of one array on one device
    largest: str  # its type and shape


@dataclass(frozen=True)
class _Instruction:
    type: str
    opcode: str
    rest: str


def facts(text: str, num_partitions: int, loops: Sequence[int] = ()) -> Facts:
    """Of `compiled.as_text()`. `loops[d]` is the trip count of loops at depth d whose count XLA does not know."""
    computations, entry = _parse(text)
    found: dict[tuple, int] = defaultdict(int)
    largest, largest_type = 0, ""
    for instruction, times in _walk(computations, entry, tuple(loops), 0, 1):
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES and not instruction.opcode.endswith("-done"):
            groups = _groups(instruction.rest, num_partitions)
            if sent := _sent(instruction, opcode, len(groups[0])):
                found[opcode, sent, groups] += times
        if opcode == "send" and (collective := _between_slices(instruction, num_partitions)):
            found[collective] += times
        if not instruction.type.startswith("("):
            size = _bytes(instruction.type)
            if size > largest:
                largest, largest_type = size, instruction.type.split("{")[0]
    collectives = tuple(Collective(kind, sent, times, groups) for (kind, sent, groups), times in found.items())
    return Facts(collectives, largest, largest_type)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line.startswith(" ") and (header := _COMPUTATION.match(line)):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(*found.groups()[1:]))
    return computations, entry


def _walk(
    computations: dict[str, list[_Instruction]], name: str, loops: tuple[int, ...], depth: int, times: int
) -> Iterator[tuple[_Instruction, int]]:
    """Every instruction that runs, and how often. Of the insides of fusions, which are no tensors, collectives alone."""
    in_fusions: dict[str, _Instruction] = {}  # one that XLA for TPUs hides behind products is in each of them
    for instruction in computations.get(name, ()):
        yield instruction, times
        if instruction.opcode == "fusion":
            for fused in computations.get(_CALLED.findall(instruction.rest)[0], ()):
                if fused.opcode in COLLECTIVES and (channel := _CHANNEL.search(fused.rest)):
                    in_fusions.setdefault(channel[1], fused)
        if instruction.opcode in ("fusion", "reduce", "sort", "scatter", "map", "custom-call", *COLLECTIVES):
            continue
        inner, inner_depth = times, depth
        if instruction.opcode == "while":
            if (trips := _trips(instruction, computations)) is not None:
                inner = times * trips
            else:
                inner, inner_depth = times * (loops[depth] if depth < len(loops) else 1), depth + 1
        called = _CALLED.findall(instruction.rest)
        if branches := _BRANCHES.search(instruction.rest):
            called += [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        for computation in called:
            yield from _walk(computations, computation, loops, inner_depth, inner)
    for fused in in_fusions.values():
        yield fused, times


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """As XLA notes it, or, as it does not for TPUs, by the condition that a number is less than a constant.

    jax counts such loops from 0 by 1. A bound that is not a constant is an array of the loop, and has none here.
    """
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    condition = _CONDITION.search(loop.rest)
    instructions = computations.get(condition[1], []) if condition else []
    constants = [instruction for instruction in instructions if instruction.opcode == "constant"]
    if len(constants) != 1 or instructions[-1].opcode != "compare" or "direction=LT" not in instructions[-1].rest:
        return None
    return int(constants[0].rest.partition(")")[0])


def _bytes(type_text: str) -> int:
    total = 0
    for dtype, sizes in _SHAPE.findall(type_text):
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            bits = int(digits[0]) if digits else 0
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _sent(instruction: _Instruction, opcode: str, group: int) -> float:
    """Bytes that one device sends, from the size of the result; the type of a `-start` may hold the operand as well."""
    size = _bytes(instruction.type)
    both = instruction.opcode.endswith("-start") and instruction.type.startswith("((")
    both |= instruction.opcode.endswith("-start") and opcode in ("all-gather", "reduce-scatter", "collective-permute")
    if opcode == "all-gather":
        size = size * group / (group + 1) if both else size
        return size * (group - 1) / group
    if opcode == "reduce-scatter":
        size = size / (group + 1) if both else size
        return size * (group - 1)
    size = size / 2 if both else size
    if opcode == "collective-permute":
        return size
    return (2 if opcode == "all-reduce" else 1) * size * (group - 1) / group


def _between_slices(instruction: _Instruction, num_partitions: int) -> tuple[str, float, tuple] | None:
    """(kind, bytes, groups) of what slices of TPUs send each other through their hosts, which XLA writes as a `send`.

    The slices take part with their devices of the same number; in our meshes, partitions are numbered slice by slice.
    """
    found = _MEGASCALE.search(instruction.rest)
    if found is None:
        return None
    slices = sum(int(last or first) - int(first) + 1 for first, last in re.findall(r"(\d+)(?::(\d+))?", found[1]))
    kind, each = found[2].lower().replace("_", "-"), num_partitions // slices
    shape = _SHAPE.search(instruction.type)
    assert shape is not None
    size = _bytes(shape[0]) * ((2 if kind == "all-reduce" else 1) * (slices - 1) / slices)
    return kind, size, tuple(tuple(range(number, num_partitions, each)) for number in range(each))


def _groups(rest: str, num_partitions: int) -> tuple[tuple[int, ...], ...]:
    """The groups of partitions, in any of the ways that XLA writes them.

    `{{0,1},{2,3}}`; rows of a transposed range, `[4,2]<=[2,4]T(1,0)`; axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`, or
    a factor of an axis, `{'b':(1)2}`: 2 ways, after 1 coarser ones, where `device_ids=([4,2]T(1,0))` may say in which
    order the mesh is numbered; of a permutation its pairs.
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1]))
    if ranged := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        numbers = _numbers(ranged[3], ranged[4])
        return _as_groups(numbers.reshape(int(ranged[1]), int(ranged[2])))
    if meshed := _MESHED.search(rest):
        return _along_mesh_axes(*meshed.groups())
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", rest)
    if listed:
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    assert "replica_groups={}" in rest or "replica_groups=" not in rest, f"groups in a way not known here: {rest[:300]}"
    return (tuple(range(num_partitions)),)


def _numbers(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(size) for size in sizes.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers


def _along_mesh_axes(mesh: str, range_: str | None, order: str | None, chosen: str) -> tuple[tuple[int, ...], ...]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    # Every axis as (before, the part that is meant, after): of a whole axis the part is all of it.
    parts = {name: (size, 1, 1) for name, size in sizes.items()}
    for name, before, ways in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        before, ways = (int(before), int(ways)) if ways else (1, sizes[name])
        parts[name] = before, ways, sizes[name] // (before * ways)
    numbers = _numbers(range_, order) if range_ else np.arange(math.prod(sizes.values()))
    numbers = numbers.reshape([n for part in parts.values() for n in part])
    inside = [i for i in range(numbers.ndim) if i % 3 == 1]
    outside = [i for i in range(numbers.ndim) if i not in inside]
    members = math.prod(numbers.shape[i] for i in inside)
    return _as_groups(numbers.transpose(outside + inside).reshape(-1, members))


def _as_groups(numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, numbers.tolist()))
