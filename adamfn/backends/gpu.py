"""The step of a leaf as one kernel on GPU, by Triton.

A tile is some whole blocks of the leaf, a block in a row. An array lies in memory in the order of
its elements, so that leaves of every shape are cut alike, and copied never.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adamfn.backends import means
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
from adamfn.core.program import Call
from adamfn.core.varying import shape_like
from adamfn.formats.bits import Operations, lending
from adamfn.formats.blocks import along, size_for
from adamfn.formats.indices import indices_at, runs_of, strides_of

_ELEMENTS = 256
"""Of a warp, eight for each thread. Where no block is longer, a tile is of one warp, which need not
wait for others."""
_LARGEST_BLOCK = 1024


def _by_instruction(name: str, x: jax.Array) -> jax.Array:
    """An instruction of PTX of float32 numbers."""
    like = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    (found,) = triton.elementwise_inline_asm(
        f"{name} $0, $1;", args=[x], constraints="=r,r", pack=1, result_shape_dtypes=[like]
    )
    return found


_OPERATIONS = Operations(
    partial(_by_instruction, "rcp.approx.ftz.f32"), partial(_by_instruction, "sqrt.approx.ftz.f32")
)


def can_run(call: Call, avals: Any) -> bool:
    """Whether there is a kernel for a call."""
    block, leaf = common_block(call, avals), avals[3 + call.arrays_kept]
    return (
        block is not None
        and block <= _LARGEST_BLOCK
        and (not by_layer(call) or _fits_layers(call, leaf.shape, block))
        and leaf.size < 2**31
        # Else `means` runs it: XLA joins the update with what it is for, and never writes it.
        and (call.program.update_dtype is None or not factor_places(call))
    )


def _fits_layers(call: Call, shape: tuple[int, ...], block: int) -> bool:
    """Whether a tile that is summed is of one layer."""
    if not block or len(shape) < 2:
        return False
    size = size_for(shape[-1], block)
    blocks = math.prod(shape[1:-1]) * pl.cdiv(shape[-1], size)
    return call.program.measures is None or blocks % _tile(size)[0] == 0


def _tile(size: int) -> tuple[int, int]:
    """How many blocks of a size are in a tile, and how wide the row of each is: a power of two."""
    width = 2 ** math.ceil(math.log2(size))
    return max(_ELEMENTS // width, 1), width


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`."""
    vector, count, numbers = operands[:3]
    arrays = with_moving_rows(call, operands)
    leaf, factors = arrays[call.arrays_kept], factor_places(call) | row_places(call)
    arrays = with_factors(call, arrays)
    block_size = common_block(call, operands)
    assert block_size is not None
    length = leaf.shape[-1] if block_size else leaf.size
    size = size_for(length, block_size) if block_size else _ELEMENTS
    across = pl.cdiv(length, size)
    blocks = leaf.size // length * across
    height, width = _tile(size)
    whole = length % size == 0 and size == width and blocks % height == 0
    measures = call.program.measures is not None
    layers, rows_in_layer = (leaf.shape or (1,))[0], math.prod(leaf.shape[1:-1])
    results = results_of(call, arrays)
    strides = call.strides_of(0, leaf.shape)
    runs, rows = runs_of(leaf.shape, strides), runs_of(leaf.shape[:-1], strides[:-1])

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        block = pl.program_id(0) * height + jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        within = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        row = jax.lax.div(block, jnp.int32(across))
        place = (block - row * across) * size + within
        elements = row * length + place if length % size else block * size + within
        inside, exists = None, None
        if not whole:
            inside = (place < length) & (within < size) & (block < blocks)
            inside |= jnp.zeros(elements.shape, bool)
            exists = block < blocks
        of_blocks, of_elements = (block, exists), (elements, inside)

        def at(k: int) -> tuple[jax.Array, jax.Array | None]:
            """Where an array's tile lies, and what of it is in the array."""
            shape = arrays[k].shape
            if k not in factors:
                return of_elements if shape == leaf.shape else of_blocks
            steps = [
                0 if n == 1 else step for n, step in zip(shape, strides_of(shape), strict=True)
            ]
            outer = indices_at(row, runs_of(leaf.shape[:-1], steps[:-1]))
            return (outer + place, inside) if steps[-1] else (outer, exists)

        def load(k: int) -> jax.Array:
            where, mask = at(k)
            ref = refs[k]
            other = None if mask is None else jnp.zeros((), ref.dtype)
            return triton.load(ref.at[where], mask=mask, other=other)

        if len(runs) == 1:
            numbers = elements
        elif block_size:
            numbers = indices_at(row, rows) + place
        else:
            numbers = indices_at(elements, runs)
        tiles = [load(k) for k in range(len(arrays))]
        layer = jnp.minimum(jax.lax.div(row, jnp.int32(rows_in_layer)), layers - 1)
        with lending(_OPERATIONS if platform == "cuda" else None):
            values = run_tile(call, vector, words, tiles, numbers, inside, along(1), layer, layers)
        if measures:
            total = jnp.sum(jnp.sum(values[0], axis=1), axis=0)
            triton.store(refs[-1].at[pl.program_id(0)], total)
            return
        for (k, *_), ref, value in zip(results, refs[len(arrays) :], values, strict=True):
            where, mask = at(k)
            triton.store(ref.at[where], value.astype(ref.dtype), mask=mask)

    views, grid = [array.reshape(-1) for array in arrays], (pl.cdiv(blocks, height),)
    sums = [shape_like(leaf, jnp.float32, grid)] if measures else []
    found = pl.pallas_call(
        kernel,
        out_shape=sums or [shape_like(views[k], dtype) for k, dtype, _ in results],
        grid=grid,
        input_output_aliases={2 + k: at for at, (k, _, same) in enumerate(results) if same},
        compiler_params=triton.CompilerParams(num_warps=height * width // _ELEMENTS),
        cost_estimate=cost_of(views, results),
        interpret=platform == "cpu",
        name="adamfn_step",
    )(given_scalars(vector), words_of(numbers, count), *views)
    if measures:
        return [jnp.sum(found[0].reshape(sums_in(call, leaf.shape), -1), axis=1)]
    moved = [x.reshape(arrays[k].shape) for (k, *_), x in zip(results, found, strict=True)]
    return means.with_means(call, operands, moved)
