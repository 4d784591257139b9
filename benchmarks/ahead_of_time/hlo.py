# SPDX-License-Identifier: Apache-2.0
"""A compiled program, read from XLA's text of it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

TYPE = re.compile(r"\b([a-z]+[0-9][a-z0-9]*|pred)\[([\d,]*)\](?:\{([^{}]*)\})?")
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array as a type names it."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What it takes in device memory: none if it lies in a nearer memory, and with its padding.

        A layout `{1,0:T(8,128)S(1)}` names the dimensions from the one that varies fastest, the
        tile that the fastest ones are padded to, and the memory.
        """
        if re.search(r"S\([1-9]", self.layout):
            return 0
        order, _, tiling = self.layout.partition(":")
        padded = [self.dims[int(d)] for d in order.split(",") if d] or list(self.dims[::-1])
        tile = re.match(r"T\(([\d,]+)\)", tiling)
        if tile:
            sizes = [int(n) for n in tile[1].split(",")][::-1]
            padded = [
                -(-n // sizes[i]) * sizes[i] if i < len(sizes) else n for i, n in enumerate(padded)
            ]
        return math.ceil(math.prod(padded) * _bits(self.dtype) / 8)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    """What stands between its parentheses."""
    attributes: str

    @property
    def arrays(self) -> list[Array]:
        """Those of its result, one unless it is a tuple."""
        return arrays_of(self.type)

    @property
    def elements(self) -> int:
        """Of all arrays of its result."""
        return sum(array.elements for array in self.arrays)

    @property
    def bytes(self) -> int:
        """Of its result in device memory."""
        return sum(array.bytes for array in self.arrays)

    def named(self, *attributes: str) -> list[str]:
        """The computations that these attributes name, such as `calls`, `body`, `to_apply`."""
        found: list[str] = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            found += NAME.findall(match[1]) if match else []
        return found


class Computation(NamedTuple):
    """Instructions by name, each after its operands, and the last or the one marked ROOT."""

    instructions: dict[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that make an instruction's operands."""
        return [self.instructions[name] for name in instruction.operands]


class Program(NamedTuple):
    """All computations of a program, and which of them runs."""

    computations: dict[str, Computation]
    entry: Computation


def arrays_of(type_: str) -> list[Array]:
    """The arrays in a type."""
    return [
        Array(dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in TYPE.findall(type_)
    ]


def parse(text: str) -> Program:
    """Reads a program.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry = None
    instructions: dict[str, Instruction] = {}
    root, name, is_entry = None, "", False
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            is_entry, name = bool(header[1]), header[2]
            instructions, root = {}, None
        elif line.startswith("}") and instructions:
            root = root or list(instructions.values())[-1]
            computations[name] = Computation(instructions, root)
            entry = computations[name] if is_entry else entry
            instructions = {}
        elif found := INSTRUCTION.match(line):
            marked, own, type_, opcode, rest = found.groups()
            inside, attributes = _closed(rest)
            operands = tuple(NAME.findall(inside))
            made = Instruction(own, type_, opcode, operands, inside, attributes)
            instructions[own] = made
            root = made if marked else root
    if entry is None:
        raise ValueError("parse: found no line that begins with ENTRY; expected a compiled program")
    return Program(computations, entry)


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a loop's body runs: as the compiler noted, or as its condition says.

    Raises:
      ValueError: neither says so.
    """
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if noted:
        return int(noted[1])
    condition = program.computations[loop.named("condition")[0]]
    for compared in condition:
        if compared.opcode == "compare" and "direction=LT" in compared.attributes:
            bounds = [x for x in condition.operands(compared) if x.opcode == "constant"]
            if bounds:
                return int(bounds[0].inside)
    raise ValueError(f"trip_count: nothing says how often the loop {loop.name} runs")


def _closed(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and what after it."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
