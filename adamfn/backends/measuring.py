"""A mean over the whole leaf that a formula needs, found in a pass of its own before the step.

A call of such a program becomes two that kernels run tile by tile: one sums what the mean is of,
and one is given the mean among its scalars.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from adamfn.core.placement import Axes
from adamfn.core.program import Call, Part, Program


def in_passes(
    run: Callable[[Call, Sequence[jax.Array]], list[jax.Array]],
    call: Call,
    operands: Sequence[jax.Array],
    axes: Axes = (),
) -> list[jax.Array]:
    """The results of a call of one leaf, with a pass before it for each mean that it needs.

    Args:
      run: what runs a call.
      call: the call; if it is packed, it needs no mean.
      operands: its operands.
      axes: the axes of a mesh that split each dimension of the leaf, inside `jax.shard_map`.
    """
    place = next((k for k, part in enumerate(call.program.parts) if part.needs_mean), None)
    # A formula that looks at other elements besides is run on whole leaves alone.
    if place is None or not call.program.parts[place].elementwise:
        return run(call, operands)
    vector, *others = operands
    end = 3 + call.arrays_kept
    leaf, part, measuring = operands[end], call.program.parts[place], _measuring(call, place)
    arrays = operands[3:] if measuring.program.reads_params else operands[3 : end + 1]
    # Behind a barrier: XLA would write to memory what both passes compute.
    apart = jax.lax.optimization_barrier([*arrays])
    (total,) = run(measuring, [*operands[:3], *apart])
    elements = math.prod(leaf.shape[1:] if part.stacked else leaf.shape)
    names = [name for own in (axes[1:] if part.stacked else axes) for name in own]
    if names:
        total, elements = jax.lax.psum(total, names), jax.lax.psum(elements, names)
    mean = total / max(elements, 1)  # 0 of an empty leaf
    start = _end_of_scalars(call, place, leaf)
    vector = jnp.concatenate([vector[:start], mean, vector[start:]])
    return in_passes(run, _knowing(call, place), [vector, *others], axes)


def places_of_scalars(program: Program, layers: int) -> list[int | slice]:
    """Where each scalar lies in a call's vector: a slice of one that each layer has."""
    numbers = jax.tree.unflatten(program.scalars, range(program.scalars.num_leaves))
    own = [
        jax.tree.leaves(numbers[k])[-1]
        for k, part in enumerate(program.parts)
        if part.layered and k != program.measures
    ]
    found: list[int | slice] = []
    start = 0
    for k in range(program.scalars.num_leaves):
        found.append(slice(start, start + layers) if k in own else start)
        start += layers if k in own else 1
    return found


def by_layer(call: Call) -> bool:
    """Whether each layer has a scalar, or a sum, of its own."""
    return any(part.layered for part in call.program.parts)


def measured(call: Call) -> Part:
    """The part that a call measures."""
    assert call.program.measures is not None
    return call.program.parts[call.program.measures]


def sums_in(call: Call, shape: tuple[int, ...]) -> int:
    """How many sums a call that measures has of a leaf: one, or one for each layer."""
    return shape[0] if measured(call).layered else 1


def _measuring(call: Call, place: int) -> Call:
    """The call whose result is the sum that a part needs the mean of."""
    program = call.program
    part = program.parts[place]
    own = replace(part, formula=part.mean, mean=None, stacked=False, layered=part.stacked)
    later = [replace(other, mean=None, reads=()) for other in program.parts[place + 1 :]]
    parts = (*program.parts[:place], own, *later)
    measures = replace(program, parts=parts, moves=False, update_dtype=None, measures=place)
    return replace(call, program=measures)


def _knowing(call: Call, place: int) -> Call:
    """The call that is given a part's mean, behind its other scalars."""
    program = call.program
    part = program.parts[place]
    own = replace(part, mean=None, stacked=False, layered=part.stacked)
    numbers = jax.tree.unflatten(program.scalars, range(program.scalars.num_leaves))
    numbers = (*numbers[:place], (*numbers[place], 0), *numbers[place + 1 :])
    parts = (*program.parts[:place], own, *program.parts[place + 1 :])
    knows = replace(program, parts=parts, scalars=jax.tree.structure(numbers))
    return replace(call, program=knows)


def _end_of_scalars(call: Call, place: int, leaf: jax.Array) -> int:
    """Where the scalars of a part end in the vector."""
    numbers = jax.tree.unflatten(call.program.scalars, range(call.program.scalars.num_leaves))
    last = len(jax.tree.leaves(numbers[: place + 1])) - 1
    if last < 0:
        return 0
    found = places_of_scalars(call.program, leaf.shape[0] if leaf.ndim else 1)[last]
    return found + 1 if isinstance(found, int) else found.stop
