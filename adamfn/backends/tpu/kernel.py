"""The step of a leaf as one kernel on TPU, by Mosaic.

A tile has 128 rows of the leaf, in the lanes of the TPU's registers, and whole blocks of them along
the sublanes: so a block of any size is reduced and scaled lane by lane. If the leaf is laid out the
other way round, the tile is transposed in the near memory. For a leaf with one axis, a tile has 128
neighbouring blocks.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from adamfn.backends import tile
from adamfn.backends.tpu import operands as ops
from adamfn.backends.tpu.cut import LANES, Cut, cut_of, indices_in, inside_of
from adamfn.backends.tpu.lanes import squares
from adamfn.backends.xla import run_call
from adamfn.core.program import Call
from adamfn.formats.blocks import along
from adamfn.formats.format import answer
from adamfn.formats.noise import runs_of


def _cut_for(call: Call, avals: Sequence[Any]) -> Cut | None:
    """How a call's leaf is cut; None if there is no kernel for it."""
    block, shape = tile.common_block(call, avals), avals[3 + call.arrays_kept].shape
    if block is None:
        return None
    means = [avals[3 + k].shape for k in tile.means_in(call)]
    rows = runs_of(shape[:-1], call.strides_of(0, shape)[:-1])
    cut = cut_of(shape, block, merges=not means and len(rows) == 1)
    if cut is None:
        return None
    whole, *slabs = ([own[a] for a in cut.order[:-2]] for own in (shape, *means))
    return cut if all(own == whole or math.prod(own) == 1 for own in slabs) else None


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether there is a kernel for a call."""
    return _cut_for(call, avals) is not None


def can_lower(call: Call, avals: Sequence[Any]) -> bool:
    """Whether Pallas lowers it here: for a vector that stays one axis, it asks for the TPU."""
    leaf = avals[3 + call.arrays_kept]
    if leaf.ndim == 1 and leaf.size % LANES and hasattr(tpu, "get_tpu_info"):  # since jax 0.9
        try:
            tpu.get_tpu_info()
        except ValueError:  # compiled on another machine, and no mesh names the TPU
            return False
    return True


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """Replaces `run_call` for a call that it `can_run`."""
    cut, means = _cut_for(call, operands), tile.means_in(call)
    assert cut is not None
    arrays = operands[3:]
    results = tile.results_of(call, arrays)
    strides = call.strides_of(0, arrays[call.arrays_kept].shape)[-len(cut.shape) :]
    shapes = [(*cut.shape[:-1], x.shape[-1]) for x in arrays]
    given = [
        ops.factor_of(x, cut) if k in means else ops.operand_of(x.reshape(shapes[k]), cut)
        for k, x in enumerate(_with_factors(call, arrays))
    ]
    moments = run_call(call, *operands) if means else []  # XLA computes no more than the means
    if means:  # mu is in units of the next nu
        factors = _with_factors(call, moments[: call.arrays_kept])
        given += [ops.factor_of(factors[place], cut) for place in sorted(means)]

    def kernel(step: Any, *refs: Any) -> None:
        ins, outs = refs[: len(given)], refs[len(given) :][: len(results)]
        scratch = iter(refs[len(given) + len(results) :])
        spaces = [next(scratch) if operand.staged else None for operand in given]
        square = {ref.dtype: ref for ref in scratch}
        slab, row, column = (pl.program_id(axis) for axis in range(3))
        first = column * cut.columns
        within = jax.lax.broadcasted_iota(jnp.int32, (cut.size, LANES), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (cut.size, LANES), 1)
        for operand, ref, space in zip(given, ins, spaces, strict=True):
            if space is not None:
                # The scales of blocks come for a whole row.
                when = column == 0 if operand.by_block else True
                pl.when(when)(partial(ops.stage, operand, ref, space))

        def one_block(k: jax.Array, _: None) -> None:
            tiles = [
                ops.read(operand, ref if space is None else space, cut, first, k, square)
                for operand, ref, space in zip(given, ins, spaces, strict=True)
            ]
            at = row * LANES + lane, first + k, within
            indices, inside = indices_in(cut, strides, slab, *at), inside_of(cut, *at)
            tiles, factors = tiles[: len(arrays)], tiles[len(arrays) :]
            values = tile.run_tile(call, step, tiles, indices, inside, along(0), factors)
            for (like, _), out, value in zip(results, outs, values, strict=True):
                target = out if spaces[like] is None else spaces[like]
                ops.write(given[like], target, cut, first, k, square, value)

        jax.lax.fori_loop(0, jnp.minimum(cut.columns, cut.blocks - first), one_block, None)
        for (like, _), out in zip(results, outs, strict=True):
            if spaces[like] is not None:
                ops.unstage(given[like], spaces[like], out)

    small = pl.BlockSpec(memory_space=tpu.SMEM)
    squared = [jnp.float32, jnp.int32] if cut.flat else []
    found = tile.run_kernel(
        kernel,
        call,
        operands,
        [operand.view for operand in given],
        platform,
        grid=cut.grid,
        in_specs=[small, small, small, *(operand.spec for operand in given)],
        out_specs=[given[k].spec for k, _ in results],
        scratch_shapes=[
            *(tpu.VMEM((x.staged, LANES), x.dtype) for x in given if x.staged),
            *(tpu.VMEM((LANES * squares(cut.size), LANES), dtype) for dtype in squared),
        ],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel" if cut.flat else "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
    )
    moved = [
        ops.result_of(given[k], x, shapes[k], cut).reshape(arrays[k].shape)
        for (k, _), x in zip(results, found, strict=True)
    ]
    for place in sorted(means):
        moved.insert(place, moments[place])
    return moved


def _with_factors(call: Call, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays of a call, with factors of nu, which have some axes of 1, in place of means."""
    (rows,) = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    for k, (part, row) in enumerate(zip(call.program.parts, rows, strict=True)):
        factors = answer(part.format, "factors")
        if factors:
            rows[k] = (*row[:-1], tuple((scale, factors(means)) for scale, means in row[-1]))
    return [*jax.tree.leaves(rows), *arrays[call.arrays_kept :]]
