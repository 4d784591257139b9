"""The step of a leaf as a Pallas kernel: by Triton on GPU, by Mosaic on TPU, interpreted on CPU.

The leaf is seen as a matrix, and the matrix cut into tiles. What the kernel does with a tile is
`LeafStep`: the reference's formulas, given the numbers that the tile's elements have in the leaf.
Float32, bfloat16 and, on GPU, 8bit have kernels, for shapes that need no copy to be cut so.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from adamfn.formats import EightBit, Format
from adamfn.formats.blocks import size_for
from adamfn.fused import cpu
from adamfn.fused.reference import Group, LeafStep
from adamfn.fused.scalars import Scalars

_TRITON = triton.CompilerParams(num_warps=4)
_PARAMETERS: dict[str, Any] = {
    "cuda": _TRITON,
    "rocm": _TRITON,
    "tpu": tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
}


class Tiling(NamedTuple):
    """A leaf as a matrix, and the shape of the tiles that it is cut into."""

    matrix: tuple[int, int]
    tile: tuple[int, int]


def tiling(shape: tuple[int, ...], format: Format | None, platform: str) -> Tiling | None:
    """How a leaf is cut; None if it is not, and goes through XLA."""
    if math.prod(shape) == 0:
        return None
    if platform in ("cuda", "rocm"):
        return _for_triton(shape, format)
    if platform == "tpu":
        return _for_mosaic(shape, format)
    return _for_mosaic(shape, format) or _for_triton(shape, format)


def _for_triton(shape: tuple[int, ...], format: Format | None) -> Tiling | None:
    """Tiles of a power of two of elements, 1024 at most; none reaches over the edge.

    A leaf lies in memory in the order of its elements, so that any rows will do: of 8bit, blocks.
    """
    size = math.prod(shape)
    if isinstance(format, EightBit):
        columns = size_for(shape[-1], format.block)
        if shape[-1] % columns:
            return None
    else:
        columns = math.gcd(size, 1024)
    if columns not in (128, 256, 512, 1024):
        return None
    rows = size // columns
    return Tiling((rows, columns), (math.gcd(rows, 1024 // columns), columns))


def _for_mosaic(shape: tuple[int, ...], format: Format | None) -> Tiling | None:
    """Tiles of 65536 elements at most, which may reach over the edge.

    A leaf lies in memory by tiles of up to 32 by 128 of its last two axes (of 1024 if it has one),
    so that only these rows are no copy; and XLA turns a narrow one around. 8bit's sixteenths of a
    block would be laid out anew.
    """
    *leading, last = shape or (1,)
    flat = not leading and last % 1024 == 0
    by_rows = len(leading) == 1 or (len(leading) > 1 and leading[-1] % 32 == 0)
    columns = 128 if flat else last if by_rows else 0
    if columns < 128 or isinstance(format, EightBit):
        return None
    rows, width = math.prod(shape) // columns, min(columns, 1024)
    height = 2**16 // width // 32 * 32
    return Tiling((rows, columns), (min(rows, height), width))


def can_run(group: Group, avals: Any, platform: str) -> bool:
    """Whether there is a kernel for a group."""
    *_, g, p = avals
    alone = not group.packed and len(group.decays) == 1
    known = alone and cpu.knows(group.format, g.dtype, p.dtype)
    return known and tiling(p.shape, group.format, platform) is not None


def step_leaf(
    group: Group, platform: str, *operands: jax.Array, interpret: bool = False
) -> list[jax.Array]:
    """`step_group` of a group of one leaf, if the platform `can_run` it."""
    vector, count, numbers, *arrays = operands
    cut = tiling(arrays[-1].shape, group.format, platform)
    assert cut is not None
    (rows, columns), (height, width) = cut

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        *moments, g, p = (ref[...] for ref in refs[: len(arrays)])
        ((mu, nu),) = jax.tree.unflatten(group.stored, moments)
        row = pl.program_id(0) * height + jax.lax.broadcasted_iota(jnp.int32, cut.tile, 0)
        column = pl.program_id(1) * width + jax.lax.broadcasted_iota(jnp.int32, cut.tile, 1)
        elements = (row * columns + column).astype(jnp.uint32)
        scalars = Scalars(*(vector[k] for k in range(len(Scalars._fields))))
        step = LeafStep(group.format, group.nesterov, group.decays[0])
        moved = step(words[0], g, p, mu, nu, words[1], scalars, elements)
        for ref, value in zip(refs[len(arrays) :], jax.tree.leaves(moved), strict=True):
            ref[...] = value

    views = [array.reshape(rows, array.size // rows) for array in arrays]
    # What 8bit keeps of a block has one element where the leaf has a row.
    tiles = [
        pl.BlockSpec((height, min(width, view.shape[1])), lambda i, j: (i, j)) for view in views
    ]
    small = pl.BlockSpec(memory_space=tpu.SMEM if platform == "tpu" else None)
    moved = [*range(group.moments), group.moments + 1]
    results = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(views[k].shape, views[k].dtype) for k in moved],
        grid=(pl.cdiv(rows, height), pl.cdiv(columns, width)),
        in_specs=[small, small, *tiles],
        out_specs=[tiles[k] for k in moved],
        input_output_aliases={2 + k: place for place, k in enumerate(moved)},
        compiler_params=_PARAMETERS.get(platform),
        interpret=interpret,
        name="adamfn_step",
    )(vector, jnp.stack([numbers[0].astype(jnp.int32), count]), *views)
    return [result.reshape(arrays[k].shape) for k, result in zip(moved, results, strict=True)]
