"""The step of a leaf as one kernel on TPU, by Mosaic.

A tile has 128 rows of the leaf, in the lanes of the TPU's registers, and whole blocks of them along
the sublanes: so a block of any size is reduced and scaled lane by lane. Where the leaf lies the
other way round, the tile is turned over in the near memory. Of a leaf of one axis, a tile has 128
blocks that follow each other.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from adamfn.backends.cut import LANES, Cut, blocks_viewed, cut_of, numbers_in, unviewed, viewed
from adamfn.backends.lanes import gather_blocks, scatter_blocks, squares
from adamfn.backends.tile import (
    common_block,
    cost_of,
    factor_places,
    results_of,
    run_tile,
    with_factors,
    words_of,
)
from adamfn.backends.xla import run_call
from adamfn.formats.blocks import along
from adamfn.formats.elements import runs_of
from adamfn.program import Call
from adamfn.varying import shape_like


def _cut_for(call: Call, avals: Sequence[Any]) -> Cut | None:
    """How a call's leaf is cut; None if there is no kernel for it."""
    block, shape, factors = common_block(call, avals), avals[3 + call.arrays_kept].shape, []
    if block is not None:
        factors = [avals[3 + k].shape for k in factor_places(call)]
    strides = call.strides_of(0, shape)
    merges = not factors and len(runs_of(shape[:-1], strides[:-1])) == 1
    cut = None if block is None else cut_of(shape, block, merges=merges)
    if cut is None:
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


def run_leaf(call: Call, *operands: jax.Array, interpret: bool = False) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`."""
    vector, count, numbers, *arrays = operands
    kept, factors = call.arrays_kept, factor_places(call)
    cut = _cut_for(call, operands)
    assert cut is not None
    shape = arrays[kept].shape
    strides = call.strides_of(0, shape)
    arrays = with_factors(call, arrays)
    given = [_operand(x, shape, cut, k in factors) for k, x in enumerate(arrays)]
    views = [own.view for own in given]
    results = results_of(call, arrays)
    columns = cut.width // cut.size
    slabs = 1 if cut.flat else views[kept].shape[0]

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        ins, refs = refs[: len(arrays)], refs[len(arrays) :]
        outs, scratch = refs[: len(results)], iter(refs[len(results) :])
        spaces = [None if own.turns is None else next(scratch) for own in given]
        square = {ref.dtype: ref for ref in scratch}
        slab, row, column = (pl.program_id(axis) for axis in range(3))
        for own, ref, space in zip(given, ins, spaces, strict=True):
            if space is not None:
                x = ref[...].astype(space.dtype)
                if own.turns:
                    x = jnp.broadcast_to(x, (LANES, cut.width)).T
                space[...] = x.reshape(space.shape)
        first = column * columns

        def kept_of(own: _Operand, ref: Any, k: jax.Array) -> Any:
            if cut.flat:
                here = pl.ds(pl.multiple_of(k * LANES, LANES), LANES)
                return ref.at[here] if own.view.ndim == 1 else ref.at[:, here]
            return ref.at[pl.ds(0 if own.view.shape[1] == 1 else first + k, 1), :]

        def one_block(k: jax.Array, carry: None) -> None:
            start = pl.multiple_of(k * cut.size, 16)
            here = pl.ds(start, cut.size)
            tiles = [
                kept_of(own, ref, k)[...].reshape(1, LANES)
                if space is None
                else gather_blocks(space, start, cut.size, square[space.dtype])
                if cut.flat
                else space[here, :]
                for own, ref, space in zip(given, ins, spaces, strict=True)
            ]
            within, lane = (
                jax.lax.broadcasted_iota(jnp.int32, (cut.size, LANES), axis) for axis in (0, 1)
            )
            at = row * LANES + lane
            numbers = numbers_in(shape, strides, cut, slab, at, first + k, within)
            if cut.flat:
                inside = numbers < shape[0]
            else:
                inside = (first + k) * cut.size + within < cut.length
            numbers += words[2]
            values = run_tile(call, vector, words, tiles, numbers, inside, along(0))
            for (source, *_), out, value in zip(results, outs, values, strict=True):
                space = spaces[source]
                if space is None:
                    here_kept = kept_of(given[source], out, k)
                    here_kept[...] = value.reshape(here_kept.shape)
                elif cut.flat:
                    value = value.astype(space.dtype)
                    scatter_blocks(value, space, start, cut.size, square[space.dtype])
                else:
                    space[here, :] = value.astype(space.dtype)

        jax.lax.fori_loop(0, jnp.minimum(columns, cut.blocks - first), one_block, None)
        for (source, *_), out in zip(results, outs, strict=True):
            space = spaces[source]
            if space is not None:
                x = space[...].T if given[source].turns else space[...]
                out[...] = x.astype(out.dtype).reshape(out.shape)

    small = pl.BlockSpec(memory_space=tpu.SMEM)
    found = pl.pallas_call(
        kernel,
        out_shape=[shape_like(views[k], dtype) for k, dtype, _ in results],
        grid=(slabs, pl.cdiv(cut.rows, LANES), pl.cdiv(cut.length, cut.width)),
        in_specs=[small, small, *(own.spec for own in given)],
        out_specs=[given[k].spec for k, *_ in results],
        scratch_shapes=[
            *(
                tpu.VMEM((cut.width, LANES), _widened(own.view.dtype))
                for own in given
                if own.turns is not None
            ),
            *(
                tpu.VMEM((LANES * squares(cut.size), LANES), dtype)
                for dtype in (jnp.float32, jnp.int32)
                if cut.flat
            ),
        ],
        input_output_aliases={2 + k: at for at, (k, _, same) in enumerate(results) if same},
        compiler_params=tpu.CompilerParams(
            dimension_semantics=(
                "parallel",
                "parallel",
                "parallel" if cut.flat else "arbitrary",
            ),
            vmem_limit_bytes=64 * 2**20,
        ),
        cost_estimate=cost_of(views, results),
        interpret=interpret,
        name="adamfn_step",
    )(vector, words_of(numbers, count), *views)
    moved = [unviewed(x, arrays[k].shape, cut) for (k, *_), x in zip(results, found, strict=True)]
    if factors:
        whole = run_call(call, *operands)  # of which no more than the means is computed
        for place in sorted(factors):
            moved.insert(place, whole[place])
    return moved


class _Operand(NamedTuple):
    """An array as the kernel takes it."""

    view: jax.Array
    spec: pl.BlockSpec
    turns: bool | None
    """Whether it is turned over in the near memory; None if it is used as it comes."""


def _operand(x: jax.Array, leaf: tuple[int, ...], cut: Cut, is_factor: bool) -> _Operand:
    slab: int = 1 if is_factor and math.prod(x.shape[a] for a in cut.order[:-2]) == 1 else 0

    def spec(shape: tuple[int, int], place: Callable[[Any, Any], tuple[Any, Any]]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda s, i, j: (0 if slab else s, *place(i, j)))

    if is_factor:
        view = viewed(x, cut)
        view = view.transpose(0, 2, 1) if cut.turned else view  # rows before the last axis
        if view.shape[2] == 1:
            view = jnp.broadcast_to(view, (view.shape[0], cut.rows, 1)).transpose(0, 2, 1)
            return _Operand(view, spec((1, LANES), lambda i, j: (0, i)), None)
        if view.shape[1] == 1:
            return _Operand(view, spec((1, cut.width), lambda i, j: (0, j)), True)
        return _Operand(view, spec((LANES, cut.width), lambda i, j: (i, j)), True)
    if cut.flat:
        turns = None if x.shape != leaf else False
        each = cut.width if turns is False else cut.width // cut.size  # in a lane
        if leaf[0] % LANES:
            return _Operand(x, pl.BlockSpec((each * LANES,), lambda s, i, j: (j,)), turns)
        if turns is None:
            kept = spec((1, each * LANES), lambda i, j: (0, j))
            return _Operand(x.reshape(1, 1, -1), kept, turns)
        return _Operand(x.reshape(1, -1, LANES), spec((each, LANES), lambda i, j: (j, 0)), turns)
    if x.shape != leaf:
        kept = spec((cut.blocks, LANES), lambda i, j: (0, i))
        return _Operand(blocks_viewed(x, cut), kept, None)
    if cut.turned:
        return _Operand(viewed(x, cut), spec((cut.width, LANES), lambda i, j: (j, i)), False)
    return _Operand(viewed(x, cut), spec((LANES, cut.width), lambda i, j: (i, j)), True)


def _widened(dtype: Any) -> Any:
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32
