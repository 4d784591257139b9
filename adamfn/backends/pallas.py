"""The step of a leaf as a Pallas kernel: by Triton on GPU, by Mosaic on TPU, interpreted on CPU.

The leaf is seen as a matrix, and the matrix cut into tiles. What the kernel does with a tile is
the leaf's program, given the numbers that the tile's elements have in the leaf.
Float32, bfloat16 and, on GPU, 8bit have kernels, for shapes that need no copy to be cut so.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from adamfn.backends import cpu
from adamfn.formats import EightBit, Format
from adamfn.formats.blocks import size_for
from adamfn.program import Call
from adamfn.varying import shape_like

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


def can_run(call: Call, avals: Any, platform: str) -> bool:
    """Whether there is a kernel for a call."""
    program = call.program
    formats = {part.format for part in program.parts if part.active and part.keeps}
    leaves = avals[3 + call.arrays_kept :]
    return (
        not call.packed
        and call.leaves == 1
        and len(formats) == 1
        and cpu.knows_format(next(iter(formats)))
        and program.dtype == jnp.float32
        and all(part.elementwise for part in program.parts)
        and all(aval.dtype in (jnp.float32, jnp.bfloat16) for aval in leaves)
        and tiling(leaves[0].shape, next(iter(formats)), platform) is not None
    )


def run_leaf(
    call: Call, platform: str, *operands: jax.Array, interpret: bool = False
) -> list[jax.Array]:
    """`run_call` of a call of one leaf, if the platform `can_run` it."""
    vector, count, numbers, *arrays = operands
    program, kept = call.program, call.arrays_kept
    format = next(part.format for part in program.parts if part.active and part.keeps)
    cut = tiling(arrays[kept].shape, format, platform)
    assert cut is not None
    (rows, columns), (height, width) = cut

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        *own, g, p = (
            (ref[...] for ref in refs[: len(arrays)])
            if program.reads_params
            else (
                *(ref[...] for ref in refs[: len(arrays)]),
                None,
            )
        )
        row = pl.program_id(0) * height + jax.lax.broadcasted_iota(jnp.int32, cut.tile, 0)
        column = pl.program_id(1) * width + jax.lax.broadcasted_iota(jnp.int32, cut.tile, 1)
        elements = (row * columns + column).astype(jnp.uint32)
        scalars = [vector[k] for k in range(program.scalars.num_leaves)]
        (parts,) = jax.tree.unflatten(call.kept, own)
        moved = program(words[0], scalars, words[1], g, p, parts, elements)
        for ref, value in zip(refs[len(arrays) :], jax.tree.leaves(moved), strict=True):
            ref[...] = value

    views = [array.reshape(rows, array.size // rows) for array in arrays]
    # What 8bit keeps of a block has one element where the leaf has a row.
    tiles = [
        pl.BlockSpec((height, min(width, view.shape[1])), lambda i, j: (i, j)) for view in views
    ]
    small = pl.BlockSpec(memory_space=tpu.SMEM if platform == "tpu" else None)
    results: list[tuple[int, Any, int | None]] = [(k, views[k].dtype, k) for k in range(kept)]
    if program.update_dtype is not None:
        results.append((kept, program.update_dtype, None))
    if program.moves:
        results.append((kept + 1, views[-1].dtype, kept + 1))
    found = pl.pallas_call(
        kernel,
        out_shape=[shape_like(views[k], dtype) for k, dtype, _ in results],
        grid=(pl.cdiv(rows, height), pl.cdiv(columns, width)),
        in_specs=[small, small, *tiles],
        out_specs=[tiles[k] for k, *_ in results],
        input_output_aliases={
            2 + own: place for place, (*_, own) in enumerate(results) if own is not None
        },
        compiler_params=_PARAMETERS.get(platform),
        interpret=interpret,
        name="adamfn_step",
    )(vector, jnp.stack([numbers[0].astype(jnp.int32), count]), *views)
    return [x.reshape(arrays[k].shape) for (k, *_), x in zip(results, found, strict=True)]
