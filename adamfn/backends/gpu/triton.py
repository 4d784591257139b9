# SPDX-License-Identifier: Apache-2.0
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

from adamfn.backends.tile import LeafCall
from adamfn.formats.bits import Operations, lending
from adamfn.formats.blocks import along
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


def run_leaf(leaf: LeafCall, platform: str) -> list[jax.Array] | None:
    """The results, if the blocks are not too large."""
    u, block_size = leaf.u, leaf.size
    if block_size > _LARGEST_BLOCK or u.size >= 2**31:
        return None
    length, size = (u.shape[-1], block_size) if block_size else (u.size, _ELEMENTS)
    across = pl.cdiv(length, size)
    blocks = u.size // length * across
    width = 2 ** math.ceil(math.log2(size))  # of a row of the tile: a power of two
    height = max(_ELEMENTS // width, 1)
    whole = length % size == 0 and size == width and blocks % height == 0
    rows = runs_of(u.shape[:-1], leaf.strides[:-1])

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
        of_block = block, exists
        where = [(elements, inside) if x.shape == u.shape else of_block for x in leaf.arrays]
        for ref, (places, mask) in zip(refs, where, strict=False):
            other = None if mask is None else jnp.zeros((), ref.dtype)
            tiles.append(triton.load(ref.at[places], mask=mask, other=other))
        indices = indices_at(row, rows) + column if block_size else indices_at(elements, leaf.runs)
        with lending(_OPERATIONS if platform == "cuda" else None):
            values = leaf.run_tile(step, tiles, indices, inside, along(1))
        for (k, _), ref, value in zip(leaf.results, refs[len(where) :], values, strict=True):
            places, mask = where[k]
            triton.store(ref.at[places], value.astype(ref.dtype), mask=mask)

    found = leaf.run_kernel(
        kernel,
        [x.reshape(-1) for x in leaf.arrays],
        platform,
        grid=(pl.cdiv(blocks, height),),
        compiler_params=triton.CompilerParams(num_warps=height * width // _ELEMENTS),
    )
    return leaf.shaped(found)
