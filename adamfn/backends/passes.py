# SPDX-License-Identifier: Apache-2.0
"""The program of a leaf by XLA on GPU, in passes, where its formats have blocks but no kernel.

Each pass decodes and averages the leaf again, to reduce its blocks once more; the last one encodes
it. In one pass XLA would keep what the next reduction reads in memory, nine bytes an element.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends.tile import LeafCall
from adamfn.formats.blocks import along
from adamfn.formats.noise import indices_at


def run_leaf(leaf: LeafCall, platform: str) -> list[jax.Array] | None:
    """The results, if the blocks are whole."""
    u, size = leaf.u, leaf.size
    if not size or u.size >= 2**31 or u.shape[-1] % size:
        return None
    scalars, count, indices = leaf.operands[:3]
    views = [x.reshape(-1, size if x.shape == u.shape else 1) for x in leaf.arrays]
    shape = u.size // size, size
    row, within = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    elements = indices_at(row * size + within, leaf.runs)
    known: list[jax.Array] = []
    while True:
        views, known = jax.lax.optimization_barrier((views, known))  # lest XLA join two passes
        asked: list[jax.Array] = []

        def largest(x: jax.Array, known: Any = known, asked: Any = asked) -> jax.Array:
            asked.append(known[len(asked)] if len(asked) < len(known) else along(1)(x))
            return asked[-1]

        step = scalars, count.reshape(1), indices.reshape(2)
        values = leaf.run_tile(step, views, elements, None, largest)
        if len(asked) == len(known):
            typed = [x.astype(dtype) for x, (_, dtype) in zip(values, leaf.results, strict=True)]
            return leaf.shaped(typed)
        known = asked[: len(known) + 1]
