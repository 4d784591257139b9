# SPDX-License-Identifier: Apache-2.0
"""The program of a large leaf by XLA in chunks of rows, on accelerators, where it has no kernel.

Between its passes over a whole leaf, XLA keeps many bytes for each element in memory.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends.tile import LeafCall
from adamfn.backends.xla import run_call
from adamfn.core.placement import vary_together
from adamfn.formats.codecs import Pair
from adamfn.formats.format import answer
from adamfn.formats.means import KnownFactors
from adamfn.formats.noise import Seed, indices_at, runs_of

ELEMENTS = 2**20
"""Elements of a chunk, unless a row is longer: with 60 temporary bytes for each, 60 MiB."""


def run_leaf(leaf: LeafCall, platform: str) -> list[jax.Array] | None:
    """The results, if chunks save memory, and the formats store each row by itself.

    On TPU, means of nu over several rows are computed first. Each chunk is given their factors.
    """
    u, at, program = leaf.u, leaf.place_of_u, leaf.call.program
    formats = [part.format for part in program.parts]
    shared = [answer(f, "factors") if isinstance(f, Pair) else None for f in formats]
    structure = jax.tree.structure(leaf.operands[3:])
    places: Any = jax.tree.unflatten(structure, range(len(leaf.arrays)))
    means = {
        place
        for s, row in zip(shared, places[0][0], strict=True)
        for _, found in (row[-1] if s else ())
        for place in jax.tree.leaves(found)
    }
    above = u.shape[: u.ndim - 1], (*u.shape[: u.ndim - 2], 1)
    fits = (
        any(answer(format, "kernel_block") != 0 for format in formats)
        and all(s or answer(f, "stores_rows") for f, s in zip(formats, shared, strict=True))
        and (platform == "tpu" or not means)  # XLA for GPU moves fewer bytes by itself
        and u.ndim >= 2
        and u.size > 2 * ELEMENTS
        and all(
            x.shape[: u.ndim - 1] in above[: 1 + (k in means)] for k, x in enumerate(leaf.arrays)
        )
    )
    if not fits:
        return None
    length, last = u.size // u.shape[-1], u.shape[-1]
    slab = u.shape[-2] if means else length
    # Of the sizes that a TPU cuts from its tiles without a copy, one that leaves no rest, if any.
    most = min(max(ELEMENTS // last, 1), slab)
    rows = next((n for n in range(most // 32 * 32, 0, -32) if slab % n == 0), most)
    if slab < length and slab % rows:
        return None
    new: dict[int, Any] = {}
    arrays, factors = leaf.arrays, [() for _ in shared]
    if means:
        moments = run_call(leaf.call, leaf.operands)  # XLA computes no more than the means
        new = {k: x for (k, _), x in zip(leaf.results, jax.tree.leaves(moments), strict=True)}
        kept = [
            (*row[:-1], tuple((scale, s(found)) for scale, found in row[-1])) if s else row
            for s, row in zip(shared, leaf.operands.kept[0], strict=True)
        ]
        arrays = [*jax.tree.leaves(kept), *leaf.arrays[at:]]
        pairs = zip(shared, moments.kept[0], strict=True)
        factors = [s(row[-1][0][1]) if s else () for s, row in pairs]
    views = [x.reshape(-1, *x.shape[u.ndim - 1 :]) for x in arrays]
    factors = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), factors)
    results = [(k, dtype) for k, dtype in leaf.results if k not in means]
    runs = runs_of(u.shape[:-1], leaf.strides[:-1])
    scalars, count, ((index, first),) = leaf.operands[:3]

    def advance(start: jax.Array, rows: int, done: list[jax.Array]) -> list[jax.Array]:
        """The results, with the results of one chunk put in."""

        def chunk_of(x: jax.Array) -> jax.Array:
            by_row = len(x) == length
            first, size = (start, rows) if by_row else (start // slab, 1)
            return jax.lax.dynamic_slice_in_dim(x, first, size)

        current = dict(enumerate(views)) | {
            k: x for (k, _), x in zip(results, done, strict=True) if k != at
        }
        chunk = [chunk_of(current[k]) for k in range(len(views))]
        (kept,), (g,), p = jax.tree.unflatten(structure, chunk)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, g.shape, axis) for axis in (0, 1))
        elements = first + (indices_at(start + row, runs) + column).astype(jnp.uint32)
        parts = list(program.parts)
        for k, known in enumerate(jax.tree.map(chunk_of, factors)):
            pair: Any = parts[k].format
            if known:
                parts[k] = parts[k]._replace(format=replace(pair, nu=KnownFactors(known)))
        moved = replace(program, parts=tuple(parts))(
            Seed(count, index), [*scalars], g, p[0] if p else None, kept, elements
        )
        values = {k: x for (k, _), x in zip(leaf.results, jax.tree.leaves(moved), strict=True)}
        return [
            jax.lax.dynamic_update_slice_in_dim(x, values[k], start, 0)
            for x, (k, _) in zip(done, results, strict=True)
        ]

    done = [
        views[k] if k != at else vary_together([u, jnp.zeros((length, last), dtype)])[1]
        for k, dtype in results
    ]
    full = length // rows
    done = jax.lax.fori_loop(0, full, lambda i, done: advance(i * rows, rows, done), done)
    if length % rows:
        done = advance(jnp.int32(full * rows), length % rows, done)
    new |= {k: x for (k, _), x in zip(results, done, strict=True)}
    return leaf.shaped([new[k] for k, _ in leaf.results])
