# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a compiled program read from device memory and write to it."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from .hlo import Computation, Instruction, Program, parse, trip_count

FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "opt-barrier"}
FREE |= {"after-all", "add-dependency", "partition-id", "replica-id"}
FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast", "Sharding", "SPMDFullToShardShape")
COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
COLLECTIVES |= {"ragged-all-to-all", "collective-broadcast"}
TRANSFERS = {"copy", "slice", "dynamic-slice"}
"""What moves between memories while kernels run, in two instructions, `-start` and `-done`."""
SLICES = {"slice", "dynamic-slice", "gather"}
WHOLE = {"reduce", "reduce-window", "sort", "dot", "convolution", "scatter", "custom-call"}
"""What needs all of its operands for any part of its result."""
SMALL = 2**20
"""Bytes up to which a kernel is not counted: a MiB takes about a microsecond."""


class Traffic(NamedTuple):
    """What running a computation once moves."""

    moved: int = 0
    """Bytes read and written in device memory."""
    kernels: int = 0
    collectives: Mapping[str, int] = MappingProxyType({})
    """How many of each kind run."""
    collected: int = 0
    """Bytes of what they leave on a device."""
    launches: int = 0
    """Kernels of every size, transfers and collectives."""

    def plus(self, other: "Traffic", times: int = 1) -> "Traffic":
        """Itself, and then the other so many times."""
        more = Counter({kind: times * n for kind, n in other.collectives.items()})
        return Traffic(
            self.moved + times * other.moved,
            self.kernels + times * other.kernels,
            Counter(self.collectives) + more,
            self.collected + times * other.collected,
            self.launches + times * other.launches,
        )


def traffic(text: str) -> Traffic:
    """What a compiled program moves each time it runs.

    A kernel reads its operands and writes its results: those of a fusion, of a custom call (a
    Pallas kernel is one), of a copy. Of an operand that a fusion only cuts a slice from, the slice
    counts, and of a result that is updated in place, the part that is new. A loop's body counts as
    often as it runs, and of the branches of a conditional the one that moves most.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: it is no compiled program, or nothing says how often a loop runs.
    """
    program = parse(text)
    return _of(program, program.entry)


def _of(program: Program, computation: Computation) -> Traffic:
    total = Traffic()
    for instruction in computation:
        total = total.plus(_of_instruction(program, computation, instruction))
    return total


def _of_instruction(program: Program, computation: Computation, one: Instruction) -> Traffic:
    base = one.opcode.removesuffix("-start").removesuffix("-done")
    if one.opcode in FREE or (
        one.opcode == "custom-call" and any(f'"{t}"' in one.attributes for t in FREE_TARGETS)
    ):
        return Traffic()
    if one.opcode == "while":
        (body,) = one.named("body")
        return Traffic().plus(_of(program, program.computations[body]), trip_count(program, one))
    if one.opcode == "conditional":
        branches = one.named("branch_computations", "true_computation", "false_computation")
        return max(_of(program, program.computations[name]) for name in branches)
    if one.opcode in ("call", "async-start", "call-start"):
        called = one.named("calls", "to_apply", "called_computations")
        return _of(program, program.computations[called[0]])
    if one.opcode in ("async-done", "async-update", "call-done"):
        return Traffic()
    operands = computation.operands(one)
    if base in COLLECTIVES or (base in TRANSFERS and base != one.opcode):
        return _of_transfer(base, one, operands)
    fusion = one.opcode == "fusion"
    moved = sum(_read(program, one, operands)) + _written(program, computation, one)
    collectives = _within(program, one) if fusion else Counter()
    collected = one.bytes if collectives else 0
    return Traffic(moved, int(moved > SMALL), collectives, collected, 1)


def _of_transfer(base: str, one: Instruction, operands: list[Instruction]) -> Traffic:
    """A collective, or a transfer in two instructions: the first reads, the second writes."""
    read = sum(x.bytes for x in operands)
    if one.opcode == f"{base}-done":
        return Traffic(moved=one.bytes, collected=one.bytes if base in COLLECTIVES else 0)
    collectives = Counter({base: 1} if base in COLLECTIVES else {})
    if one.opcode == f"{base}-start":
        if base in SLICES and read:  # of type ((source), target, ...)
            target = one.arrays[len(operands)]
            read = target._replace(layout=operands[0].arrays[0].layout).bytes
        return Traffic(moved=read, collectives=collectives, launches=1)
    return Traffic(read + one.bytes, 0, collectives, one.bytes, 1)


def _within(program: Program, fusion: Instruction) -> Counter[str]:
    """The collectives that a fusion is made of."""
    found: Counter[str] = Counter()
    for name in fusion.named("calls"):
        for one in program.computations[name]:
            base = one.opcode.removesuffix("-start")
            found += Counter({base: 1} if base in COLLECTIVES else {})
            found += _within(program, one) if one.opcode == "fusion" else Counter()
    return found


def _read(program: Program, one: Instruction, operands: list[Instruction]) -> list[int]:
    """Bytes of each operand that an instruction reads."""
    needed = _needed(program, one, one.elements, [x.elements for x in operands], in_place=True)
    return [
        x.bytes if n >= x.elements else int(x.bytes * n / x.elements)
        for x, n in zip(operands, needed, strict=True)
    ]


def _needed(
    program: Program, one: Instruction, elements: int, sizes: list[int], *, in_place: bool
) -> list[int]:
    """Elements of each operand that so many elements of an instruction's result are made of."""
    if one.opcode == "fusion":
        return _needed_by_fusion(program, one, elements, len(sizes))
    if one.opcode in SLICES:
        return [min(sizes[0], elements), *sizes[1:]]
    if one.opcode == "dynamic-update-slice":
        return [0 if in_place else min(sizes[0], elements), *sizes[1:]]
    if one.opcode in WHOLE or one.opcode == "tuple":
        return sizes
    return [min(size, elements) for size in sizes]


def _needed_by_fusion(program: Program, one: Instruction, elements: int, count: int) -> list[int]:
    """Elements of each operand of a fusion, asked for from its root upwards."""
    fused = program.computations[one.named("calls")[0]]
    updated = {x.name for x in _updated_in_place(fused)}
    wanted = {fused.root.name: elements}
    needed = [0] * count
    for inner in reversed(fused.instructions.values()):
        asked = min(wanted.get(inner.name, 0), inner.elements)
        if inner.opcode == "parameter":
            needed[int(inner.inside)] = asked
        if not asked:
            continue
        operands = fused.operands(inner)
        sizes = [x.elements for x in operands]
        parts = _needed(program, inner, asked, sizes, in_place=inner.name in updated)
        for operand, part in zip(operands, parts, strict=True):
            wanted[operand.name] = wanted.get(operand.name, 0) + part
    return needed


def _updated_in_place(computation: Computation) -> list[Instruction]:
    """The updates of slices that a computation's result consists of."""
    found, waiting = [], [computation.root]
    while waiting:
        one = waiting.pop()
        if one.opcode in ("tuple", "bitcast"):
            waiting += computation.operands(one)
        elif one.opcode == "dynamic-update-slice":
            found.append(one)
    return found


def _written(program: Program, computation: Computation, one: Instruction) -> int:
    """Bytes that an instruction writes: of slices that it updates in place, the slices'."""
    if one.opcode == "dynamic-update-slice":
        return computation.operands(one)[1].bytes
    if one.opcode != "fusion":
        return one.bytes
    fused = program.computations[one.named("calls")[0]]
    kept = 0
    for update in _updated_in_place(fused):
        whole, part = update.elements, fused.operands(update)[1].elements
        kept += update.bytes * (whole - part) // whole
    return max(0, one.bytes - kept)
