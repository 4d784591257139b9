"""Calls of programs by XLA: the reference, which every other backend is held to."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends.measuring import measured, places_of_scalars
from adamfn.core.leaf import Kept
from adamfn.core.program import Call, Program
from adamfn.formats.elements import numbers_of
from adamfn.formats.seeds import Seeds


def run_call(call: Call, *operands: jax.Array) -> list[jax.Array]:
    """Runs a call by XLA, which compiles what a leaf's program does into one kernel or a few."""
    if call.packed:
        return _run_packed(call, *operands)
    if call.program.measures is not None:
        return [sums_of(call, values) for values in measured_values(call, *operands)]
    rows = _run_leaves(call, *operands)
    columns = zip(*(results for _, results in rows), strict=True)
    return [*jax.tree.leaves([own for own, _ in rows]), *(x for column in columns for x in column)]


def measured_values(call: Call, *operands: jax.Array) -> list[jax.Array]:
    """Of each leaf of a call that measures what is to be summed."""
    return [values for _, (values,) in _run_leaves(call, *operands)]


def scalars_of(call: Call, vector: jax.Array, leaf: jax.Array) -> list[jax.Array]:
    """The scalars of a call; one that each layer has lies along the leaf's first axis."""
    places = places_of_scalars(call.program, leaf.shape[0] if leaf.ndim else 1)
    across = [1] * (leaf.ndim - 1)
    return [
        vector[place] if isinstance(place, int) else vector[place].reshape(-1, *across)
        for place in places
    ]


def sums_of(call: Call, values: jax.Array) -> jax.Array:
    """The sum of what is measured, of all or of each layer, as a vector."""
    axes = tuple(range(1, values.ndim)) if measured(call).layered else None
    return jnp.sum(values, axis=axes).reshape(-1)


def by_leaf(
    run: Callable[..., list[jax.Array]], call: Call, *operands: jax.Array
) -> list[jax.Array]:
    """Runs a call of several leaves as a call of each, unless they are packed."""
    if call.packed or call.leaves == 1:
        return run(call, *operands)
    vector, count, numbers, *arrays = operands
    rows = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    columns = [arrays[call.arrays_kept :][k :: call.leaves] for k in range(call.leaves)]
    kept: list[jax.Array] = []
    moved: list[list[jax.Array]] = []
    for k, (row, column) in enumerate(zip(rows, columns, strict=True)):
        strides = None if call.strides is None else call.strides[k : k + 1]
        one = Call(call.program, 1, jax.tree.structure([row]), strides=strides)
        results = run(one, vector, count, numbers[k : k + 1], *jax.tree.leaves(row), *column)
        kept += results[: one.arrays_kept]
        moved.append(results[one.arrays_kept :])
    return [*kept, *(x for column in zip(*moved, strict=True) for x in column)]


def _run_leaves(
    call: Call, vector: jax.Array, count: jax.Array, numbers: jax.Array, *arrays: jax.Array
) -> list[tuple[list[Kept], list[jax.Array]]]:
    kept = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    grads = arrays[call.arrays_kept :][: call.leaves]
    params: Sequence[Any] = arrays[call.arrays_kept + call.leaves :] or [None] * call.leaves
    scalars = scalars_of(call, vector, grads[0])
    return [
        _run_leaf(
            call.program,
            None if call.strides is None else call.strides[k],
            numbers[k],
            scalars,
            count,
            grads[k],
            params[k],
            kept[k],
        )
        for k in range(call.leaves)
    ]


@partial(jax.jit, static_argnums=(0, 1))  # traced once for all leaves of one signature
def _run_leaf(
    program: Program,
    strides: tuple[int, ...] | None,
    number: jax.Array,
    scalars: Sequence[jax.Array],
    count: jax.Array,
    g: jax.Array,
    p: jax.Array | None,
    kept: Kept,
) -> tuple[list[Kept], list[jax.Array]]:
    leaf, first = number
    numbers = None if strides is None else numbers_of(g.shape, strides, first)
    return program(Seeds.of(count, leaf), scalars, g, p, kept, numbers)


def _run_packed(
    call: Call, vector: jax.Array, count: jax.Array, numbers: jax.Array, *arrays: jax.Array
) -> list[jax.Array]:
    (kept,) = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    grads = arrays[call.arrays_kept :][: call.leaves]
    params: Any = arrays[call.arrays_kept + call.leaves :] or [None] * call.leaves
    scalars = scalars_of(call, vector, grads[0])

    def flat(leaves: Sequence[Any]) -> jax.Array:
        return jnp.concatenate([leaf.reshape(-1).astype(call.program.dtype) for leaf in leaves])

    p = None if params[0] is None else flat(params)
    own, results = call.program(Seeds.of(count, numbers[0, 0]), scalars, flat(grads), p, kept)
    ends = [*accumulate(math.prod(g.shape) for g in grads)]
    moved = [
        result[end - g.size : end].reshape(g.shape)
        for result in results
        for g, end in zip(grads, ends, strict=True)
    ]
    like = [*moved[: -call.leaves], *params] if call.program.moves else moved
    return [
        *jax.tree.leaves(own),
        *(x.astype(was.dtype) for x, was in zip(moved, like, strict=True)),
    ]
