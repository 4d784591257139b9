# SPDX-License-Identifier: Apache-2.0
"""A call of programs: what it is given, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import jax

from adamfn.core.leaf import Kept
from adamfn.core.program import Program
from adamfn.formats.noise import strides_of


class Operands(NamedTuple):
    """What a call is given. Lists have an entry for each leaf."""

    scalars: jax.Array
    """The scalars of the program and its gate, a vector."""
    count: jax.Array
    """int32."""
    indices: jax.Array
    """uint32[n, 2]: of each leaf, its index in the tree and the index of its first element."""
    kept: list[list[Kept]]
    """The state, of each part of the program."""
    updates: list[jax.Array]
    params: list[jax.Array]
    """Empty if the program does not read them."""


class Results(NamedTuple):
    """What a call returns. Lists have an entry for each leaf."""

    kept: list[list[Kept]]
    updates: list[jax.Array]
    """Empty if the program returns none."""
    params: list[jax.Array]
    """Empty if the program does not move them."""


@dataclass(frozen=True)
class Call:
    """The static part of a call, in which some leaves with one program take a step."""

    program: Program
    strides: tuple[tuple[int, ...], ...] | None = None
    """Of shards: the strides of each whole leaf, in which elements are indexed."""

    def replaced(self, operands: Operands) -> Results:
        """The operands that are like the results, but for the dtype of updates."""
        _, _, _, kept, updates, params = operands
        returns = self.program.update_dtype is not None
        return Results(kept, updates if returns else [], params if self.program.moves else [])

    def strides_of(self, leaf: int, shape: Sequence[int]) -> tuple[int, ...]:
        """The strides in which the elements of one of the leaves are indexed."""
        return strides_of(shape) if self.strides is None else self.strides[leaf]


def by_leaf(run: Callable[[Call, Operands], Results], call: Call, operands: Operands) -> Results:
    """Runs a call of several leaves as one call for each of them."""
    each: list[Results] = []
    columns: Any = operands[2:]
    for k in range(len(operands.updates)):
        own = slice(k, k + 1)
        one = call if call.strides is None else replace(call, strides=call.strides[own])
        each.append(run(one, Operands(*operands[:2], *(xs[own] for xs in columns))))
    return Results(*(list(chain(*lists)) for lists in zip(*each, strict=True)))
