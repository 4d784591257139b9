"""The step of a leaf as one kernel on GPU, by Triton.

A tile is a few whole blocks of the leaf, one in each row. Arrays are taken in the order of their
memory, so leaves of every shape are cut alike, and none is copied.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adamfn.backends import tile
from adamfn.core.program import Call
from adamfn.formats.bits import Operations, lending
from adamfn.formats.blocks import along, size_for
from adamfn.formats.noise import indices_at, runs_of

_ELEMENTS = 256
"""Elements of a warp, eight for each thread. With blocks no longer than that, a tile is one warp,
which need not wait for others."""
_LARGEST_BLOCK = 1024


def _by_instruction(name: str, x: jax.Array) -> jax.Array:
    """An instruction of PTX on float32 numbers."""
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
    block = tile.common_block(call, avals)
    small = avals[3 + call.arrays_kept].size < 2**31
    return block is not None and block <= _LARGEST_BLOCK and small and not tile.means_in(call)


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """Replaces `run_call` for a call that it `can_run`."""
    arrays, block_size = operands[3:], tile.common_block(call, operands)
    leaf, results = arrays[call.arrays_kept], tile.results_of(call, arrays)
    assert block_size is not None
    length = leaf.shape[-1] if block_size else leaf.size
    size = size_for(length, block_size) if block_size else _ELEMENTS
    across = pl.cdiv(length, size)
    blocks = leaf.size // length * across
    width = 2 ** math.ceil(math.log2(size))  # of a row of the tile: a power of two
    height = max(_ELEMENTS // width, 1)
    whole = length % size == 0 and size == width and blocks % height == 0
    strides = call.strides_of(0, leaf.shape)
    runs, rows = runs_of(leaf.shape, strides), runs_of(leaf.shape[:-1], strides[:-1])

    def kernel(step: Any, *refs: Any) -> None:
        block = pl.program_id(0) * height + jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        within = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        row = jax.lax.div(block, jnp.int32(across))
        column = (block - row * across) * size + within
        elements = row * length + column if length % size else block * size + within
        inside, exists = None, None
        if not whole:
            exists = block < blocks
            inside = (column < length) & (within < size) & exists
            inside |= jnp.zeros(elements.shape, bool)

        tiles: list[jax.Array] = []
        where = [(elements, inside) if x.shape == leaf.shape else (block, exists) for x in arrays]
        for ref, (places, mask) in zip(refs, where, strict=False):
            other = None if mask is None else jnp.zeros((), ref.dtype)
            tiles.append(triton.load(ref.at[places], mask=mask, other=other))
        indices = indices_at(row, rows) + column if block_size else indices_at(elements, runs)
        with lending(_OPERATIONS if platform == "cuda" else None):
            values = tile.run_tile(call, step, tiles, indices, inside, along(1))
        for (k, _), ref, value in zip(results, refs[len(arrays) :], values, strict=True):
            places, mask = where[k]
            triton.store(ref.at[places], value.astype(ref.dtype), mask=mask)

    views = [array.reshape(-1) for array in arrays]
    found = tile.run_kernel(
        kernel,
        call,
        operands,
        views,
        platform,
        grid=(pl.cdiv(blocks, height),),
        compiler_params=triton.CompilerParams(num_warps=height * width // _ELEMENTS),
    )
    return [x.reshape(arrays[k].shape) for (k, _), x in zip(results, found, strict=True)]
