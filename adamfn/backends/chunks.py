"""The program of a large leaf by XLA in chunks of rows, on accelerators, where it has no kernel.

Between its passes over a whole leaf, XLA keeps many bytes for each element in memory.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends import tile
from adamfn.core.placement import vary_together
from adamfn.core.program import Call
from adamfn.formats.format import answer
from adamfn.formats.noise import Seed, indices_at, runs_of

ELEMENTS = 2**20
"""Elements of a chunk, unless a row is longer: with 60 temporary bytes for each, 60 MiB."""


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether chunks save memory for a call, and its formats store each row by itself."""
    kept, leaf = avals[3:][: call.arrays_kept], avals[3 + call.arrays_kept]
    formats = [part.format for part in call.program.parts]
    return (
        any(answer(format, "kernel_block") != 0 for format in formats)
        and all(answer(format, "stores_rows") for format in formats)
        and not tile.means_in(call)  # a sum is rounded differently in another shape
        and call.leaves == 1
        and leaf.ndim >= 2
        and leaf.size > 2 * ELEMENTS
        and all(x.shape[: leaf.ndim - 1] == leaf.shape[:-1] for x in kept)
    )


def run_leaf(call: Call, *operands: jax.Array) -> list[jax.Array]:
    """Replaces `run_call` for a call that it `can_run`."""
    vector, count, indices, *arrays = operands
    leaf, results = arrays[call.arrays_kept], tile.results_of(call, arrays)
    length, last = leaf.size // leaf.shape[-1], leaf.shape[-1]
    # Of the sizes that a TPU cuts from its tiles without a copy, one that leaves no rest, if any.
    most = min(max(ELEMENTS // last, 1), length)
    even = [n for n in range(most // 32 * 32, 0, -32) if length % n == 0]
    rows = even[0] if even else most
    views = [x.reshape(length, *x.shape[leaf.ndim - 1 :]) for x in arrays]
    runs = runs_of(leaf.shape[:-1], call.strides_of(0, leaf.shape)[:-1])
    index, first = indices[0]

    def advance(start: jax.Array, rows: int, done: list[jax.Array]) -> list[jax.Array]:
        """The results, with the results of one chunk put in."""
        current = list(views)
        for (k, _), x in zip(results, done, strict=True):
            current[k] = current[k] if k == call.arrays_kept else x
        chunk = [jax.lax.dynamic_slice_in_dim(x, start, rows) for x in current]
        (kept,) = jax.tree.unflatten(call.kept, chunk[: call.arrays_kept])
        g, *p = chunk[call.arrays_kept :]
        row, column = (jax.lax.broadcasted_iota(jnp.int32, g.shape, axis) for axis in (0, 1))
        elements = first + (indices_at(start + row, runs) + column).astype(jnp.uint32)
        moved = call.program(Seed(count, index), [*vector], g, p[0] if p else None, kept, elements)
        return [
            jax.lax.dynamic_update_slice_in_dim(x, value, start, 0)
            for x, value in zip(done, jax.tree.leaves(moved), strict=True)
        ]

    done = [
        vary_together([leaf, jnp.zeros((length, last), dtype)])[1]
        if k == call.arrays_kept
        else views[k]
        for k, dtype in results
    ]
    full = length // rows
    done = jax.lax.fori_loop(0, full, lambda i, done: advance(i * rows, rows, done), done)
    if length % rows:
        done = advance(jnp.int32(full * rows), length % rows, done)
    return [x.reshape(arrays[k].shape) for (k, _), x in zip(results, done, strict=True)]
