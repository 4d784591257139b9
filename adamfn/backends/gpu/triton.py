# SPDX-License-Identifier: Apache-2.0
"""The step of a leaf as one kernel on GPU, by Triton.

A tile is a few whole blocks of the leaf, one in each row. Arrays are taken in the order of their
memory, so leaves of every shape are cut alike, and none is copied. The number of tiles is an
operand, over which programs take turns: XLA compiles one kernel for leaves of many shapes.
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
_PROGRAMS = 4096
"""About as many warps as an H100 has at a time, with their 64 registers a thread."""


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
    u, block_size, emulated = leaf.u, leaf.size, platform == "cpu"
    if block_size > _LARGEST_BLOCK or u.size >= 2**31:
        return None
    length, size = (u.shape[-1], block_size) if block_size else (u.size, _ELEMENTS)
    across = pl.cdiv(length, size)
    blocks = u.size // length * across
    width = 2 ** math.ceil(math.log2(size))  # of a row of the tile: a power of two
    height = max(_ELEMENTS // width, 1)
    turns = pl.cdiv(blocks, height)
    programs = min(turns, 3) if emulated else _PROGRAMS
    whole = length % size == 0 and size == width and blocks % height == 0
    in_order = length % size == 0 and leaf.runs == ((u.size, 1),)
    rows = runs_of(u.shape[:-1], leaf.strides[:-1])

    def kernel(step: Any, *refs: Any) -> None:
        ins, outs = refs[: len(leaf.arrays)], refs[len(leaf.arrays) + 1 :]
        first = pl.program_id(0)
        mine = jax.lax.div(refs[len(ins)][0] - first + (programs - 1), jnp.int32(programs))

        def turn(k: jax.Array, _: None) -> None:
            take(first + k * programs, step, ins, outs)

        jax.lax.fori_loop(0, mine, turn, None)

    def take(tile: jax.Array, step: Any, ins: Any, outs: Any) -> None:
        block = tile * height + jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        within = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        elements = indices = block * size + within
        inside, exists = None, None
        if not (whole and in_order):
            row = jax.lax.div(block, jnp.int32(across))
            column = (block - row * across) * size + within
            elements = row * length + column if length % size else elements
            by_row = indices_at(row, rows) + column
            indices = by_row if block_size else indices_at(elements, leaf.runs)
            if not whole:
                exists = block < blocks
                inside = (column < length) & (within < size) & exists
                inside |= jnp.zeros(elements.shape, bool)

        tiles: list[jax.Array] = []
        of_block = block, exists
        where = [(elements, inside) if x.shape == u.shape else of_block for x in leaf.arrays]
        for ref, (places, mask) in zip(ins, where, strict=True):
            other = None if mask is None else jnp.zeros((), ref.dtype)
            tiles.append(triton.load(ref.at[places], mask=mask, other=other))
        with lending(_OPERATIONS if platform == "cuda" else None):
            values = leaf.run_tile(step, tiles, indices, inside, along(1))
        for (k, _), ref, value in zip(leaf.results, outs, values, strict=True):
            places, mask = where[k]
            triton.store(ref.at[places], value.astype(ref.dtype), mask=mask)

    # Where references are to one element, the kernel does not depend on how many follow it.
    spec = pl.BlockSpec() if emulated else pl.BlockSpec((1,), lambda i: (0,))
    found = leaf.run_kernel(
        kernel,
        [*(x.reshape(-1) for x in leaf.arrays), jnp.array([turns], jnp.int32)],
        platform,
        grid=(programs,),
        in_specs=[spec] * (4 + len(leaf.arrays)),
        out_specs=[spec] * len(leaf.results),
        compiler_params=triton.CompilerParams(num_warps=height * width // _ELEMENTS),
    )
    return leaf.shaped(found)
