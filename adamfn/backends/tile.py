"""The program of a leaf on a tile of it, as kernels run it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adamfn.core.placement import shape_like
from adamfn.core.program import Call
from adamfn.formats.blocks import Largest
from adamfn.formats.format import InTile, answer
from adamfn.formats.noise import Seed


def common_block(call: Call, avals: Sequence[Any]) -> int | None:
    """The largest block of a call's formats; 0 if all are elementwise, None if it has no kernel."""
    leaves = avals[3 + call.arrays_kept :]
    found = {0, *(answer(part.format, "kernel_block") for part in call.program.parts)}
    fits = (
        None not in found
        and len(found) <= 2
        and call.leaves == 1
        and call.program.dtype == jnp.float32
        and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in leaves)
        and leaves[0].size > 0
    )
    return max(found) if fits else None


def means_in(call: Call) -> frozenset[int]:
    """The places, in the state, of means of nu over more than a tile. Kernels leave them to XLA."""
    (rows,) = jax.tree.unflatten(call.kept, range(call.arrays_kept))
    return frozenset(
        place
        for part, row in zip(call.program.parts, rows, strict=True)
        if answer(part.format, "factors")
        for _, means in row[-1]
        for place in jax.tree.leaves(means)
    )


def results_of(call: Call, arrays: Sequence[Any]) -> list[tuple[int, Any]]:
    """For each result of a call of one leaf, except means of nu: the array like it, and its dtype.

    Every result but the update replaces that array.
    """
    program, kept = call.program, call.arrays_kept
    results = [(k, arrays[k].dtype) for k in range(kept) if k not in means_in(call)]
    if program.update_dtype is not None:
        results.append((kept, program.update_dtype))
    if program.moves:
        results.append((kept + 1, arrays[kept + 1].dtype))
    return results


def run_kernel(
    kernel: Callable[..., None],
    call: Call,
    operands: Sequence[jax.Array],
    views: Sequence[jax.Array],
    platform: str,
    **options: Any,
) -> list[jax.Array]:
    """Runs a Pallas kernel, in place, on views of a call's arrays.

    The kernel gets references: three that `run_tile` takes as its step, and to views and results.
    """
    vector, count, indices = operands[:3]
    results = results_of(call, views)
    out_shape = [shape_like(views[k], dtype) for k, dtype in results]
    moved, most = [*views, *out_shape], max(x.size for x in views)
    aliases = {3 + k: at for at, (k, _) in enumerate(results) if k != call.arrays_kept}
    cost = pl.CostEstimate(  # for XLA's scheduler; the operations are a guess
        100 * most, 2 * most, sum(x.size * x.dtype.itemsize for x in moved)
    )
    with jax.enable_x64(False):  # Mosaic has no numbers of 64 bits, not even for constants
        return pl.pallas_call(
            lambda *refs: kernel(refs[:3], *refs[3:]),
            out_shape,
            input_output_aliases=aliases,
            cost_estimate=cost,
            interpret=platform == "cpu",
            name="adamfn_step",
            **options,
        )(vector, count.reshape(1), indices.reshape(2).astype(jnp.int32), *views)


def run_tile(
    call: Call,
    step: Sequence[Any],
    arrays: Sequence[jax.Array],
    indices: jax.Array,
    inside: jax.Array | None,
    largest: Largest,
    factors: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """The values of `results_of` for a tile of whole blocks, in any dtype that holds them.

    Args:
      call: the call of the leaf.
      step: references to the scalars; to the count; to the leaf's index in the tree and the index
        of its first element.
      arrays: the tile of each array, with factors in place of means of nu.
      indices: the elements' indices, int32, counted from the leaf's first element.
      inside: True for elements of the leaf; None if all are.
      largest: the largest of the tile's blocks.
      factors: the tile of each factor of the next nu, in the order of `means_in`.
    """
    (rows,) = jax.tree.unflatten(call.kept, range(call.arrays_kept))
    next_of = dict(zip(sorted(means_in(call)), factors, strict=True))
    parts = list(call.program.parts)
    for k, (part, row) in enumerate(zip(parts, rows, strict=True)):
        if answer(part.format, "kernel_block"):
            format = InTile(part.format, inside, largest)
            if answer(part.format, "factors"):  # of the first nu; beside any other, mu is 0
                places = jax.tree.leaves(row[-1][0][1])
                format = format._replace(factors=[next_of[place] for place in places])
            parts[k] = part._replace(format=format)
    program = replace(call.program, parts=tuple(parts), gated=False)
    vector, count, (leaf, first) = step[0], step[1][0], (step[2][0], step[2][1])
    scalars = [vector[k] for k in range(program.scalars.num_leaves)]
    (kept,) = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    g, *p = arrays[call.arrays_kept :]
    indices = indices.astype(jnp.uint32) + first.astype(jnp.uint32)
    values = jax.tree.leaves(
        program(Seed(count, leaf), scalars, g, p[0] if p else None, kept, indices)
    )
    if not call.program.gated:
        return values
    # The gate is applied here, as the state has means that a tile does not compute.
    taken = vector[len(scalars)] > 0
    return [
        jnp.where(taken, x, 0 if k == call.arrays_kept else arrays[k].astype(x.dtype))
        for (k, _), x in zip(results_of(call, arrays), values, strict=True)
    ]
