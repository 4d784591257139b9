"""Calls of programs by XLA: the reference for every other backend."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from adamfn.core.leaf import Kept
from adamfn.core.placement import vary_together
from adamfn.core.program import Call, Program
from adamfn.formats.noise import Seed, indices_of


def run_call(
    call: Call, vector: jax.Array, count: jax.Array, indices: jax.Array, *arrays: jax.Array
) -> list[jax.Array]:
    """Runs a call by XLA, which compiles the program of a leaf into one kernel or a few."""
    rows = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    kept: list[list[Kept]] = []
    moved: list[list[jax.Array]] = []
    for k, row in enumerate(rows):
        u, *p = arrays[call.arrays_kept :][k :: call.leaves]
        strides = None if call.strides is None else call.strides[k]
        new, results = _run_leaf(
            call.program, strides, (vector, count, indices[k]), u, p[0] if p else None, row
        )
        kept.append(new)
        moved.append(results)
    return [*jax.tree.leaves(kept), *(x for column in zip(*moved, strict=True) for x in column)]


def by_leaf(
    run: Callable[..., list[jax.Array]], call: Call, *operands: jax.Array
) -> list[jax.Array]:
    """Runs a call of several leaves as one call for each of them."""
    vector, count, indices, *arrays = operands
    rows = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    kept: list[jax.Array] = []
    moved: list[list[jax.Array]] = []
    for k, row in enumerate(rows):
        strides = None if call.strides is None else call.strides[k : k + 1]
        one = Call(call.program, 1, jax.tree.structure([row]), strides)
        leaf = arrays[call.arrays_kept :][k :: call.leaves]
        results = run(one, vector, count, indices[k : k + 1], *jax.tree.leaves(row), *leaf)
        kept += results[: one.arrays_kept]
        moved.append(results[one.arrays_kept :])
    return [*kept, *(x for column in zip(*moved, strict=True) for x in column)]


@partial(jax.jit, static_argnums=(0, 1))  # traced once for all leaves of one signature
def _run_leaf(
    program: Program,
    strides: tuple[int, ...] | None,
    step: tuple[jax.Array, jax.Array, jax.Array],
    u: jax.Array,
    p: jax.Array | None,
    kept: list[Kept],
) -> tuple[list[Kept], list[jax.Array]]:
    vector, count, (index, first) = step
    indices = None if strides is None else indices_of(u.shape, strides, first)
    return program(Seed(count, index), [*vector], u, p, kept, indices)


@partial(jax.jit, static_argnums=0)
def run_whole(
    program: Program,
    vector: jax.Array,
    count: jax.Array,
    index: jax.Array,
    arrays: Sequence[Any],
    given: Sequence[Any],
) -> tuple[list[Kept], list[jax.Array]]:
    """Runs a program on a whole leaf, if a statistic of the leaf is part of it.

    Args:
      program: the program.
      vector: its scalars.
      count: the step.
      index: the leaf's.
      arrays: the update, the parameter or None, and the state.
      given: the state of parts of earlier segments that it reads, then the gradient if it reads it.
    """
    leaves, treedef = jax.tree.flatten((arrays, given))
    (u, p, kept), given = treedef.unflatten(vary_together(leaves))
    return program(Seed(count, index), [*vector], u, p, kept, given=given)
