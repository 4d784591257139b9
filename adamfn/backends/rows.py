"""Which rows of a leaf move, found before a kernel that is given a part of a row at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends.xla import measured_values
from adamfn.core.program import Call, moving_rows


def resting_part(call: Call) -> int | None:
    """The part of what a program runs that lets rows rest; None if there is none."""
    parts = call.program.parts[: call.program.measures]
    return next((k for k, part in enumerate(parts) if part.active and part.rests), None)


def with_moving_rows(call: Call, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays of a call of one leaf, and behind them a 1 for each row that moves, else 0."""
    place = resting_part(call)
    if place is None:
        return [*operands[3:]]
    program = call.program
    parts = [*program.parts]
    parts[place] = replace(parts[place], formula=_given, rests=False)
    before = replace(program, parts=tuple(parts), moves=False, update_dtype=None, measures=place)
    (given,) = measured_values(replace(call, program=before), *operands)
    return [*operands[3:], moving_rows(given).astype(jnp.float32)]


def row_places(call: Call) -> frozenset[int]:
    """Where in `with_moving_rows` what is of the rows lies, if it is there."""
    if resting_part(call) is None:
        return frozenset()
    return frozenset([call.arrays_kept + 1 + call.program.reads_params])


def _given(u: jax.Array, *others: Any) -> jax.Array:
    return u
