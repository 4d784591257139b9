"""The program of a large leaf by XLA in chunks of rows, on accelerators, where it has no kernel.

Between its passes over a whole leaf, XLA keeps many bytes for each element in memory.
"""

import jax
import jax.numpy as jnp

from adamfn.backends.tile import LeafCall
from adamfn.core.placement import vary_together
from adamfn.formats.format import answer
from adamfn.formats.noise import Seed, indices_at, runs_of

ELEMENTS = 2**20
"""Elements of a chunk, unless a row is longer: with 60 temporary bytes for each, 60 MiB."""


def run_leaf(leaf: LeafCall, platform: str) -> list[jax.Array] | None:
    """The results, if chunks save memory, and the formats store each row by itself."""
    u, at, program = leaf.u, leaf.place_of_u, leaf.call.program
    formats = [part.format for part in program.parts]
    fits = (
        any(answer(format, "kernel_block") != 0 for format in formats)
        and all(answer(format, "stores_rows") for format in formats)
        # On GPU, XLA alone moves fewer bytes if nu has means, and keeps four.
        and (platform == "tpu" or not any(answer(format, "factors") for format in formats))
        and u.ndim >= 2
        and u.size > 2 * ELEMENTS
        and all(x.shape[: u.ndim - 1] == u.shape[:-1] for x in leaf.arrays)
    )
    if not fits:
        return None
    length, last = u.size // u.shape[-1], u.shape[-1]
    # Of the sizes that a TPU cuts from its tiles without a copy, one that leaves no rest, if any.
    most = min(max(ELEMENTS // last, 1), length)
    rows = next((n for n in range(most // 32 * 32, 0, -32) if length % n == 0), most)
    views = [x.reshape(length, *x.shape[u.ndim - 1 :]) for x in leaf.arrays]
    runs = runs_of(u.shape[:-1], leaf.strides[:-1])
    scalars, count, ((index, first),) = leaf.operands[:3]

    def advance(start: jax.Array, rows: int, done: list[jax.Array]) -> list[jax.Array]:
        """The results, with the results of one chunk put in."""
        current = dict(enumerate(views)) | {
            k: x for (k, _), x in zip(leaf.results, done, strict=True) if k != at
        }
        chunk = [jax.lax.dynamic_slice_in_dim(current[k], start, rows) for k in range(len(views))]
        (kept,), (g,), p = jax.tree.unflatten(jax.tree.structure(leaf.operands[3:]), chunk)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, g.shape, axis) for axis in (0, 1))
        elements = first + (indices_at(start + row, runs) + column).astype(jnp.uint32)
        seed = Seed(count, index)
        moved = program(seed, [*scalars], g, p[0] if p else None, kept, elements)
        return [
            jax.lax.dynamic_update_slice_in_dim(x, value, start, 0)
            for x, value in zip(done, jax.tree.leaves(moved), strict=True)
        ]

    done = [
        views[k] if k != at else vary_together([u, jnp.zeros((length, last), dtype)])[1]
        for k, dtype in leaf.results
    ]
    full = length // rows
    done = jax.lax.fori_loop(0, full, lambda i, done: advance(i * rows, rows, done), done)
    if length % rows:
        done = advance(jnp.int32(full * rows), length % rows, done)
    return leaf.shaped(done)
