# SPDX-License-Identifier: Apache-2.0
"""How a leaf is laid out in a TPU's memory, and how it is cut into tiles for a kernel."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adamfn.formats.blocks import size_for
from adamfn.formats.noise import wrapped

LANES = 128
_WIDEST = 2048
"""The most elements of a row in a tile, and of a block."""
_MOST_BLOCKS = 4096
"""The most blocks in a row: the scales of a whole row are in the near memory."""


class Cut(NamedTuple):
    """A leaf in memory as three axes, `(slabs, ..., ...)`, and its tiles."""

    shape: tuple[int, ...]
    """The leaf's, or with all rows in one slab."""
    order: tuple[int, ...]
    """Its axes from the outermost in memory: first the slabs' axes, then two more."""
    turned: bool
    """Whether its last axis comes before the rows."""
    flat: bool
    """Whether it has one axis. Then 128 neighbouring blocks make a column, as if each were of
    another row."""
    rows: int
    length: int
    """The elements of a row."""
    size: int
    """The elements of a block."""
    width: int
    """The elements of a row in a tile."""

    @property
    def blocks(self) -> int:
        """The number of blocks in a row."""
        return -(-self.length // self.size)

    @property
    def columns(self) -> int:
        """The number of blocks of a row in a tile."""
        return self.width // self.size

    @property
    def grid(self) -> tuple[int, int, int]:
        """The number of tiles: slabs, tiles of 128 rows, tiles of a row."""
        slabs = 1 if self.flat else math.prod(self.shape) // (self.rows * self.length)
        return slabs, -(-self.rows // LANES), -(-self.length // self.width)


def cut_of(shape: tuple[int, ...], block: int, *, merges: bool) -> Cut | None:
    """How a leaf is cut into blocks, of any size if `block` is 0; None if it cannot be.

    If it `merges`, slabs of few rows become one slab of many, which is another shape.
    """
    if not shape:
        return None
    length, size = shape[-1], size_for(shape[-1], block or LANES)
    if size > _WIDEST:
        return None
    if len(shape) == 1:
        whole = -(-length // (size * LANES)) * size
        width = max(_WIDEST // (8 * size), 1) * (8 * size)
        fits = size <= _WIDEST // 2 and whole * LANES < 2**31
        return Cut(shape, (0,), False, True, LANES, whole, size, width) if fits else None
    last = len(shape) - 1
    inner, outer = _two_innermost(shape)
    if last not in (inner, outer):
        return None
    rows = shape[outer if inner == last else inner]
    slabs = tuple(a for a in range(last + 1) if a not in (inner, outer))
    unit = math.lcm(size, LANES)
    width = min(max(_WIDEST // unit, 1), -(-length // unit)) * unit
    order = *slabs, outer, inner
    if merges and order == tuple(range(last + 1)) and rows < LANES and rows % 32 == 0:
        order, rows = (0, 1), math.prod(shape[:-1])
        shape = rows, length
    cut = Cut(shape, order, inner != last, False, rows, length, size, width)
    return cut if cut.blocks <= _MOST_BLOCKS else None


def _two_innermost(shape: tuple[int, ...]) -> tuple[int, int]:
    """The innermost axis and the one around it, as XLA chooses them: with the least padding."""

    def padded(pair: tuple[int, int]) -> tuple[int, int, int]:
        inner, outer = shape[pair[0]], shape[pair[1]]
        around = outer if outer in (1, 2, 4) else -(-outer // 8) * 8
        size = -(-inner // LANES) * LANES * around * math.prod(shape) // inner // outer
        return size, -pair[0], -pair[1]

    axes = range(len(shape))
    return min(((a, b) for a in axes for b in axes if a != b), key=padded)


def is_row_major(scales: tuple[int, ...], cut: Cut) -> bool:
    """Whether the scales of blocks are row after row in memory.

    XLA chooses so if a row of them is whole vectors: neither order then needs padding.
    """
    last = len(scales) - 1
    whole = cut.order == tuple(range(last + 1)) and cut.blocks % LANES == 0
    return whole and _two_innermost(scales) == (last, last - 1)


def elements_at(
    cut: Cut,
    strides: tuple[int, ...],
    slab: jax.Array,
    row: jax.Array,
    block: jax.Array,
    within: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The elements at these places in a tile.

    Returns:
      Their indices, from the leaf's first modulo 2^32, and whether they are in the leaf.
    """
    if cut.flat:
        indices = (block * LANES + row) * cut.size + within
        return indices, indices < cut.shape[0]
    column = block * cut.size + within
    inside = column < cut.length
    inside = inside & (row < cut.rows) if cut.rows % LANES else inside
    *slabs, outer, inner = cut.order
    indices = row * wrapped(strides[inner if cut.turned else outer]) + column
    for axis in reversed(slabs):
        indices += jax.lax.rem(slab, jnp.int32(cut.shape[axis])) * wrapped(strides[axis])
        slab = jax.lax.div(slab, jnp.int32(cut.shape[axis]))
    return indices, inside
