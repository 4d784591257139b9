"""A leaf's program by XLA in pieces along its rows, for what has no kernel on an accelerator.

XLA keeps what a format computes between its passes in memory: many bytes for each element of the
leaf, or of the piece.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends.measuring import by_layer, measured, sums_in
from adamfn.backends.tile import factor_places, kernel_block, results_of
from adamfn.backends.xla import scalars_of
from adamfn.core.program import Call
from adamfn.core.varying import vary_together
from adamfn.formats.indices import indices_of
from adamfn.formats.noise import Seeds

ELEMENTS = 2**20
"""In a piece, as long as a row is no longer: with 60 temporary bytes for each, 60 MiB."""


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether a call gains by it, and stores each row by itself, as far as shapes tell."""
    kept, leaf = avals[3:][: call.arrays_kept], avals[3 + call.arrays_kept]
    least = 3 if by_layer(call) else 2
    return (
        any(kernel_block(part.format) != 0 for part in call.program.parts)
        and not call.packed
        and call.leaves == 1
        and all(part.local for part in call.program.parts)
        and not factor_places(call)  # a sum is rounded otherwise in another shape
        and leaf.ndim >= least
        and leaf.size > 2 * ELEMENTS
        and all(x.ndim >= leaf.ndim and x.shape[: leaf.ndim - 1] == leaf.shape[:-1] for x in kept)
    )


def run_leaf(call: Call, *operands: jax.Array) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`."""
    vector, count, numbers, *arrays = operands
    shape = arrays[call.arrays_kept].shape
    below = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axes = range(1 if by_layer(call) else 0, len(shape))
    axis = next(a for a in axes if below[a] <= ELEMENTS or a == len(shape) - 2)
    length, strides = shape[axis], call.strides_of(0, shape)
    rows = min(max(ELEMENTS // below[axis], 1), length)
    # Along an axis of their own, pieces are cut from a TPU's tiles of 32 rows without a copy.
    even = next((n for n in range(rows // 32 * 32, 0, -32) if length % n == 0), None)
    if even is None or even == length:
        return _run(call, strides, operands, axis, rows)
    views = [x.reshape(*x.shape[:axis], length // even, even, *x.shape[axis + 1 :]) for x in arrays]
    strides = *strides[:axis], even * strides[axis], *strides[axis:]
    moved = _run(call, strides, [vector, count, numbers, *views], axis + 1, even)
    if call.program.measures is not None:
        return moved
    return [
        x.reshape(arrays[k].shape)
        for (k, *_), x in zip(results_of(call, arrays), moved, strict=True)
    ]


def _run(
    call: Call,
    strides: tuple[int, ...],
    operands: Sequence[jax.Array],
    axis: int,
    rows: int,
) -> list[jax.Array]:
    """The call in pieces that have so many rows of an axis, and one of those before it."""
    vector, count, numbers, *arrays = operands
    program, leaf = call.program, arrays[call.arrays_kept]
    results, scalars, shape = results_of(call, arrays), scalars_of(call, vector, leaf), leaf.shape
    number, first_element = numbers[0]
    seeds = Seeds.of(count, number)
    measures = program.measures is not None

    def advance(starts: Sequence[jax.Array], rows: int, done: list[jax.Array]) -> list[jax.Array]:
        """The results, with those of one piece put in."""

        def at(x: jax.Array) -> list[jax.Array]:
            return [*starts, *[jnp.int32(0)] * (x.ndim - 1 - axis)]

        current = list(arrays)
        for (k, _, in_place), x in zip(results, done, strict=not measures):
            current[k] = x if in_place else current[k]
        sizes = *[1] * axis, rows
        own = [jax.lax.dynamic_slice(x, at(x), (*sizes, *x.shape[axis + 1 :])) for x in current]
        (kept,) = jax.tree.unflatten(call.kept, own[: call.arrays_kept])
        g, *p = own[call.arrays_kept :]
        start = first_element
        for place, stride in zip(at(leaf), strides, strict=True):
            start += place.astype(jnp.uint32) * jnp.uint32(stride % 2**32)
        elements = indices_of(g.shape, strides, start)
        of_layer = [x[starts[0]].reshape([1] * g.ndim) if x.ndim else x for x in scalars]
        moved = program(seeds, of_layer, g, p[0] if p else None, kept, elements)
        if measures:
            (sums,), (_, (values,)) = done, moved
            place = starts[0] if measured(call).layered else 0
            return [sums.at[place].add(jnp.sum(values))]
        return [
            jax.lax.dynamic_update_slice(x, value, at(x))
            for x, value in zip(done, jax.tree.leaves(moved), strict=True)
        ]

    def sweep(first: int, pieces: int, rows: int, done: list[jax.Array]) -> list[jax.Array]:
        """The results after so many pieces of each slab."""

        def one(i: jax.Array, done: list[jax.Array]) -> list[jax.Array]:
            slab, place = jax.lax.div(i, jnp.int32(pieces)), jax.lax.rem(i, jnp.int32(pieces))
            starts = [first + place * rows]
            for n in reversed(shape[:axis]):
                starts.insert(0, jax.lax.rem(slab, jnp.int32(n)))
                slab = jax.lax.div(slab, jnp.int32(n))
            return advance(starts, rows, done)

        steps = jnp.int32(pieces * math.prod(shape[:axis]))
        return jax.lax.fori_loop(jnp.int32(0), steps, one, done) if pieces else done

    def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return vary_together([leaf, jnp.zeros(shape, dtype)])[1]

    done = [arrays[k] if same else zeros(shape, dtype) for k, dtype, same in results]
    if measures:
        done = [zeros((sums_in(call, shape),), program.dtype)]
    full, rest = divmod(shape[axis], rows)
    return sweep(full * rows, min(rest, 1), rest, sweep(0, full, rows, done))
