"""The step of a leaf as one kernel on TPU, by Mosaic.

A tile has 128 rows of the leaf, in the lanes of the TPU's registers, and whole blocks of them along
the sublanes: so a block of any size is reduced and scaled lane by lane. Where the leaf lies the
other way round, the tile is turned over in the near memory. Of a leaf of one axis, a tile has 128
blocks that follow each other.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from adamfn.backends.measuring import by_layer, sums_in
from adamfn.backends.rows import row_places, with_moving_rows
from adamfn.backends.tile import (
    common_block,
    cost_of,
    factor_places,
    given_scalars,
    results_of,
    run_tile,
    with_factors,
    words_of,
)
from adamfn.backends.tpu.cut import LANES, Cut, cut_of, inside_of, numbers_in
from adamfn.backends.tpu.lanes import squares
from adamfn.backends.tpu.operands import factor, operand, read, stage, unstage, unview, write
from adamfn.backends.xla import run_call
from adamfn.core.program import Call
from adamfn.core.varying import shape_like
from adamfn.formats.blocks import along
from adamfn.formats.indices import runs_of


def _cut_for(call: Call, avals: Sequence[Any]) -> Cut | None:
    """How a call's leaf is cut; None if there is no kernel for it."""
    block, shape, factors = common_block(call, avals), avals[3 + call.arrays_kept].shape, []
    if block is not None:
        factors = [avals[3 + k].shape for k in factor_places(call)]
    strides = call.strides_of(0, shape)
    merges = not factors and len(runs_of(shape[:-1], strides[:-1])) == 1
    cut = None if block is None else cut_of(shape, block, merges=merges and not by_layer(call))
    if cut is None or (by_layer(call) and (len(shape) < 3 or cut.order[0] != 0)):
        return None
    slabs = [[factor[axis] for axis in cut.order[:-2]] for factor in factors]
    whole = [shape[axis] for axis in cut.order[:-2]]
    return cut if all(own == whole or math.prod(own) == 1 for own in slabs) else None


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether there is a kernel for a call."""
    return _cut_for(call, avals) is not None


def can_lower(call: Call, avals: Sequence[Any]) -> bool:
    """Whether Pallas lowers it here: where a leaf stays of one axis, it asks what TPU it is for."""
    leaf = avals[3 + call.arrays_kept]
    if leaf.ndim != 1 or leaf.size % LANES == 0:
        return True
    try:
        tpu.get_tpu_info()
    except AttributeError:  # of before jax 0.9, which does not ask
        return True
    except ValueError:  # compiled on another machine, and no mesh names the TPU
        return False
    return True


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`."""
    vector, count, numbers = operands[:3]
    arrays = with_moving_rows(call, operands)
    kept, factors = call.arrays_kept, factor_places(call)
    cut = _cut_for(call, operands)
    assert cut is not None
    shape = arrays[kept].shape
    strides = call.strides_of(0, shape)
    arrays = with_factors(call, arrays)
    given = [
        factor(x, cut) if k in factors | row_places(call) else operand(x, shape, cut)
        for k, x in enumerate(arrays)
    ]
    views = [own.view for own in given]
    results = results_of(call, arrays)
    measures = call.program.measures is not None
    grid = cut.grid(shape)
    slabs = grid[0] // shape[0] if by_layer(call) else grid[0]  # in a layer

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        ins, refs = refs[: len(arrays)], refs[len(arrays) :]
        outs, scratch = refs[: len(results) + measures], iter(refs[len(results) + measures :])
        spaces = [next(scratch) if own.staged else None for own in given]
        square = {ref.dtype: ref for ref in scratch}
        slab, row, column = (pl.program_id(axis) for axis in range(3))
        for own, ref, space in zip(given, ins, spaces, strict=True):
            if space is not None:
                # What is kept of blocks comes for a whole row.
                when = column == 0 if own.by_block else True
                pl.when(when)(partial(stage, own, ref, space))
        first = column * cut.columns
        tile = cut.size, LANES
        within, lane = (jax.lax.broadcasted_iota(jnp.int32, tile, axis) for axis in (0, 1))

        def one_block(k: jax.Array, total: jax.Array) -> jax.Array:
            tiles = [
                read(own, ref if space is None else space, cut, first, k, square)
                for own, ref, space in zip(given, ins, spaces, strict=True)
            ]
            at = slab, row * LANES + lane, first + k, within
            numbers = numbers_in(shape, strides, cut, *at)
            inside = inside_of(shape, cut, *at)
            layer = jax.lax.div(slab, slabs)
            values = run_tile(
                call, vector, words, tiles, numbers, inside, along(0), layer, shape[0]
            )
            if measures:
                return total + jnp.sum(values[0], axis=0, keepdims=True)
            for (source, *_), out, value in zip(results, outs, values, strict=True):
                space = spaces[source]
                target = out if space is None else space
                write(given[source], target, cut, first, k, square, value)
            return total

        blocks, zero = jnp.minimum(cut.columns, cut.blocks - first), jnp.zeros((1, LANES))
        total = jax.lax.fori_loop(0, blocks, one_block, zero)
        if measures:
            outs[0][...] = jnp.broadcast_to(total, outs[0].shape)
            return
        for (source, *_), out in zip(results, outs, strict=True):
            space = spaces[source]
            if space is not None:
                unstage(given[source], space, out)

    small = pl.BlockSpec(memory_space=tpu.SMEM)
    # Of each tile the sums of its lanes, eight times: a register.
    sums = [shape_like(views[kept], jnp.float32, (*grid, 8, LANES))] if measures else []
    sum_spec = pl.BlockSpec((None, None, None, 8, LANES), lambda s, i, j: (s, i, j, 0, 0))
    squared = [jnp.float32, jnp.int32] if cut.flat else []
    call_kernel = pl.pallas_call(
        kernel,
        out_shape=sums or [shape_like(views[k], dtype) for k, dtype, _ in results],
        grid=grid,
        in_specs=[small, small, *(own.spec for own in given)],
        out_specs=[sum_spec] if measures else [given[k].spec for k, *_ in results],
        scratch_shapes=[
            *(tpu.VMEM((own.staged, LANES), own.dtype) for own in given if own.staged),
            *(tpu.VMEM((LANES * squares(cut.size), LANES), dtype) for dtype in squared),
        ],
        input_output_aliases={2 + k: at for at, (k, _, same) in enumerate(results) if same},
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel" if cut.flat else "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
        cost_estimate=cost_of(views, results),
        interpret=platform == "cpu",
        name="adamfn_step",
    )
    words = words_of(numbers, count)
    with jax.enable_x64(False):  # Mosaic has no numbers of 64 bits, not even for constants
        found = call_kernel(given_scalars(vector), words, *views)
    if measures:
        return [jnp.sum(found[0][..., 0, :].reshape(sums_in(call, shape), -1), axis=1)]
    moved = [
        unview(given[k], x, arrays[k].shape, cut) for (k, *_), x in zip(results, found, strict=True)
    ]
    if factors:
        # No more of it than the means is computed. The barriers of `means` would save nothing here,
        # and cost temporary memory on a mesh.
        whole = run_call(call, *operands)
        for place in sorted(factors):
            moved.insert(place, whole[place])
    return moved
