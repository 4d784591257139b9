"""A mean over the whole leaf that a formula needs, found in a pass of its own before the step.

A call of such a program is two of programs that a kernel can run tile by tile: one that sums what
the mean is of, and one that is given the mean among its scalars.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from adamfn.program import Call, Part


def first_to_measure(call: Call) -> int | None:
    """The place of the first part whose mean can be found before the step; None if none needs it.

    A part that looks at other elements besides is left to measure by itself, and those after it.
    """
    found = next((k for k, part in enumerate(call.program.parts) if part.needs_mean), None)
    return found if found is not None and call.program.parts[found].elementwise else None


def measuring(call: Call, place: int) -> Call:
    """The call whose result is the sum that a part needs the mean of."""
    program = call.program
    part = program.parts[place]
    own = replace(part, formula=part.mean, mean=None, stacked=False, layered=part.stacked)
    rest = [replace(later, mean=None, reads=()) for later in program.parts[place + 1 :]]
    parts = (*program.parts[:place], own, *rest)
    return replace(
        call,
        program=replace(program, parts=parts, moves=False, update_dtype=None, measures=place),
    )


def measured(call: Call) -> Part:
    """The part that a call measures."""
    assert call.program.measures is not None
    return call.program.parts[call.program.measures]


def by_layer(call: Call) -> bool:
    """Whether each layer has a scalar, or a sum, of its own."""
    return any(part.layered for part in call.program.parts)


def sums_in(call: Call, shape: tuple[int, ...]) -> int:
    """How many sums a call that measures has of a leaf: one, or one for each layer."""
    return shape[0] if measured(call).layered else 1


def knowing(call: Call, place: int) -> Call:
    """The call that is given a part's mean among its scalars."""
    program = call.program
    part = program.parts[place]
    own = replace(part, mean=None, stacked=False, layered=part.stacked)
    numbers = jax.tree.unflatten(program.scalars, range(program.scalars.num_leaves))
    scalars = (*numbers[:place], (*numbers[place], 0), *numbers[place + 1 :])
    parts = (*program.parts[:place], own, *program.parts[place + 1 :])
    structure = jax.tree.structure(scalars)
    return replace(call, program=replace(program, parts=parts, scalars=structure))


def with_mean(
    call: Call, place: int, vector: jax.Array, mean: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """The scalars of a call, with the mean behind those of a part."""
    numbers = jax.tree.unflatten(call.program.scalars, range(call.program.scalars.num_leaves))
    before = len(jax.tree.leaves(numbers[: place + 1]))
    places = [*call.program.places(shape[0] if shape else 1), vector.size]
    at = places[before]
    start = at if isinstance(at, int) else at.start
    return jnp.concatenate([vector[:start], mean, vector[start:]])


def elements_in(part: Part, shape: tuple[int, ...]) -> int:
    """How many elements of a leaf, or of each of its layers, a part's mean is over."""
    return math.prod(shape[1:] if part.stacked else shape)
