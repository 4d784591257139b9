# SPDX-License-Identifier: Apache-2.0
"""Calls of programs by XLA: the reference for every other backend."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from adamfn.backends.call import Call, Operands, Results, by_leaf
from adamfn.core.leaf import Kept
from adamfn.core.placement import vary_together
from adamfn.core.program import Program
from adamfn.formats.noise import Seed, indices_of


def run_call(call: Call, operands: Operands) -> Results:
    """Runs a call by XLA, which compiles the program of a leaf into one kernel or a few."""
    return by_leaf(_run_leaf, call, operands)


@partial(jax.jit, static_argnums=0)  # traced once for all leaves of one signature
def _run_leaf(call: Call, operands: Operands) -> Results:
    scalars, count, ((index, first),), (kept,), (u,), params = operands
    indices = None if call.strides is None else indices_of(u.shape, call.strides[0], first)
    p = params[0] if params else None
    results = call.program(Seed(count, index), [*scalars], u, p, kept, indices)
    return _sorted(call.program, *results)


@partial(jax.jit, static_argnums=0)
def run_whole(
    program: Program,
    vector: jax.Array,
    count: jax.Array,
    index: jax.Array,
    arrays: Sequence[Any],
    given: Sequence[Any],
) -> Results:
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
    return _sorted(program, *program(Seed(count, index), [*vector], u, p, kept, given=given))


def _sorted(program: Program, kept: list[Kept], moved: list[jax.Array]) -> Results:
    returned = program.update_dtype is not None
    return Results([kept], moved[:returned], moved[returned:])
