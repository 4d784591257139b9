"""The program of a leaf by XLA on GPU, in passes, where its formats have blocks but no kernel.

Each pass decodes and averages the leaf again, to reduce its blocks once more; the last one encodes
it. In one pass XLA would keep what the next reduction reads in memory, nine bytes an element.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends import tile
from adamfn.core.program import Call
from adamfn.formats.blocks import along, size_for
from adamfn.formats.noise import indices_at, runs_of


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether passes save memory for a call, whose blocks are whole."""
    block, leaf = tile.common_block(call, avals), avals[3 + call.arrays_kept]
    if not block or tile.means_in(call) or leaf.size >= 2**31:
        return False
    return leaf.shape[-1] % size_for(leaf.shape[-1], block) == 0


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """Replaces `run_call` for a call that it `can_run`."""
    (vector, count, indices), arrays = operands[:3], operands[3:]
    leaf, results = arrays[call.arrays_kept], tile.results_of(call, arrays)
    size = size_for(leaf.shape[-1], tile.common_block(call, operands) or 0)
    views = [x.reshape(-1, size if x.shape == leaf.shape else 1) for x in arrays]
    shape = leaf.size // size, size
    row, within = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    elements = indices_at(row * size + within, runs_of(leaf.shape, call.strides_of(0, leaf.shape)))
    known: list[jax.Array] = []
    while True:
        views, known = jax.lax.optimization_barrier((views, known))  # lest XLA join two passes
        asked: list[jax.Array] = []

        def largest(x: jax.Array, known: Any = known, asked: Any = asked) -> jax.Array:
            asked.append(known[len(asked)] if len(asked) < len(known) else along(1)(x))
            return asked[-1]

        step = vector, count.reshape(1), indices.reshape(2)
        values = tile.run_tile(call, step, views, elements, None, largest)
        if len(asked) == len(known):
            return [
                value.astype(dtype).reshape(arrays[k].shape)
                for (k, dtype), value in zip(results, values, strict=True)
            ]
        known = asked[: len(known) + 1]
