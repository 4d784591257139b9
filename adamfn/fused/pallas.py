"""The step of a leaf as a Pallas kernel: by Triton on GPU, by Mosaic on TPU, interpreted on CPU.

The leaf is seen as a matrix, and the matrix cut into tiles. What the kernel does with a tile is
`LeafStep`: the reference's formulas, given the numbers that the tile's elements have in the leaf.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from adamfn.fused.reference import Group, LeafStep
from adamfn.fused.scalars import Scalars

_TRITON = ("cuda", "rocm")


class Tiles(NamedTuple):
    """A leaf as a matrix, and the shape of the tiles that it is cut into."""

    matrix: tuple[int, int]
    tile: tuple[int, int]


def tiles_of(shape: tuple[int, ...], platform: str) -> Tiles | None:
    """How a leaf is cut, None if it cannot be.

    Triton's tiles have a power of two of elements, and none may reach over the edge; on GPU a leaf
    lies in memory in the order of its elements, so any rows will do. On TPU it lies in tiles of its
    last two axes: rows stay rows, and so the matrix is no copy.
    """
    size = math.prod(shape)
    if platform in _TRITON:
        columns = math.gcd(size, 1024)
        return Tiles((size // columns, columns), (1, columns)) if columns >= 128 else None
    columns = shape[-1] if len(shape) > 1 else 128
    if size == 0 or size % columns:
        return None
    rows, width = size // columns, min(columns, 1024)
    height = 2**16 // max(width, 128) // 32 * 32
    return Tiles((rows, columns), (min(rows, height), width))


def can_run(group: Group, avals: Any, platform: str) -> bool:
    """Whether there is a kernel for a group."""
    return not group.packed and tiles_of(avals[-1].shape, platform) is not None


def step_leaf(group: Group, platform: str, *operands: jax.Array) -> list[jax.Array]:
    """`step_group` of a group of one leaf, which `can_run`."""
    vector, count, numbers, *arrays = operands
    tiles = tiles_of(arrays[-1].shape, platform)
    assert tiles is not None
    (rows, columns), (height, width) = tiles

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        *moments, g, p = (ref[...] for ref in refs[: len(arrays)])
        mu, nu = jax.tree.unflatten(group.stored, moments)
        row = pl.program_id(0) * height + jax.lax.broadcasted_iota(jnp.int32, tiles.tile, 0)
        column = pl.program_id(1) * width + jax.lax.broadcasted_iota(jnp.int32, tiles.tile, 1)
        elements = (row * columns + column).astype(jnp.uint32)
        scalars = Scalars(*(vector[k] for k in range(len(Scalars._fields))))
        step = LeafStep(group.format, group.nesterov, group.decays[0])
        moved = step(words[0], g, p, mu, nu, words[1], scalars, elements)
        for ref, value in zip(refs[len(arrays) :], jax.tree.leaves(moved), strict=True):
            ref[...] = value

    words = jnp.stack([numbers[0].astype(jnp.int32), count])
    whole = pl.BlockSpec(memory_space=tpu.SMEM if platform == "tpu" else None)
    tile = pl.BlockSpec(tiles.tile, lambda i, j: (i, j))
    views = [array.reshape(rows, -1) for array in arrays]
    kept = [*range(group.moments), group.moments + 1]
    results = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(views[k].shape, views[k].dtype) for k in kept],
        grid=(pl.cdiv(rows, height), pl.cdiv(columns, width)),
        in_specs=[whole, whole, *[tile] * len(views)],
        out_specs=[tile] * len(kept),
        input_output_aliases={2 + k: place for place, k in enumerate(kept)},
        interpret=platform == "cpu",
        compiler_params=_PARAMS.get(platform),
        name="adamfn_step",
    )(vector, words, *views)
    return [result.reshape(arrays[k].shape) for k, result in zip(kept, results, strict=True)]


_PARAMS = {
    **dict.fromkeys(_TRITON, triton.CompilerParams(num_warps=4)),
    "tpu": tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
}
