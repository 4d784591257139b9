"""How a leaf lies in a TPU's memory, and how it is cut into tiles for a kernel."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from adamfn.formats.blocks import size_for
from adamfn.formats.indices import wrapped

LANES = 128
_WIDEST = 2048
"""Elements of a row in a tile, and of a block, at most."""
_MOST_BLOCKS = 4096
"""Blocks in a row: what is kept of them lies in the near memory for a whole row."""


class Cut(NamedTuple):
    """How a leaf lies in memory as `(slabs, ..., ...)`, and how it is cut into tiles."""

    order: tuple[int, ...]
    """Its axes from the outermost: first those of the slabs, then two of them."""
    merged: bool
    """Whether the slabs are so many more rows."""
    turned: bool
    """Whether its last axis comes before the rows."""
    flat: bool
    """Whether it has one axis: then 128 neighbouring blocks make a column of blocks, as if each
    were of another row."""
    rows: int
    length: int
    size: int
    width: int

    @property
    def blocks(self) -> int:
        """How many a row has."""
        return -(-self.length // self.size)

    @property
    def columns(self) -> int:
        """How many blocks of a row are in a tile."""
        return self.width // self.size

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """How many tiles there are: slabs, tiles of 128 rows, tiles of a row."""
        slabs = math.prod(shape) // (self.rows * self.length) if not self.flat else 1
        return slabs, -(-self.rows // LANES), -(-self.length // self.width)


def _places(shape: tuple[int, ...]) -> tuple[int, int]:
    """The innermost axis and the one around it that XLA chooses: those that need least padding."""

    def padded(pair: tuple[int, int]) -> tuple[int, int, int]:
        inner, outer = shape[pair[0]], shape[pair[1]]
        around = outer if outer in (1, 2, 4) else -(-outer // 8) * 8
        size = -(-inner // LANES) * LANES * around * math.prod(shape) // inner // outer
        return size, -pair[0], -pair[1]

    axes = range(len(shape))
    return min(((a, b) for a in axes for b in axes if a != b), key=padded)


def cut_of(shape: tuple[int, ...], block: int, *, merges: bool = True) -> Cut | None:
    """How a leaf is cut into blocks, of any size if it is 0; None if it is not cut."""
    if not shape:
        return None
    length, size = shape[-1], size_for(shape[-1], block or LANES)
    if size > _WIDEST:
        return None
    if len(shape) == 1:
        whole = -(-length // (size * LANES)) * size
        width = max(_WIDEST // (8 * size), 1) * (8 * size)
        fits = size <= _WIDEST // 2 and whole * LANES < 2**31
        return Cut((0,), False, False, True, LANES, whole, size, width) if fits else None
    last = len(shape) - 1
    inner, outer = _places(shape)
    if last not in (inner, outer):
        return None
    rows = shape[outer if inner == last else inner]
    slabs = tuple(a for a in range(last + 1) if a not in (inner, outer))
    unit = math.lcm(size, LANES)
    width = min(max(_WIDEST // unit, 1), -(-length // unit)) * unit
    by_order = inner == last and outer == last - 1
    merged = merges and by_order and rows < LANES and rows % 32 == 0
    if merged:
        rows *= math.prod(shape[a] for a in slabs)
    cut = Cut((*slabs, outer, inner), merged, inner != last, False, rows, length, size, width)
    return cut if cut.blocks <= _MOST_BLOCKS else None


def viewed(x: jax.Array, cut: Cut) -> jax.Array:
    """A leaf, or an array like it with axes of 1, as the kernel takes it: three axes."""
    if cut.merged:
        return x.reshape(1, -1, x.shape[-1])
    x = x.transpose(cut.order)
    return x.reshape(-1, *x.shape[-2:])


def lies_by_rows(kept: tuple[int, ...], cut: Cut) -> bool:
    """Whether what is kept of blocks, in whole vectors of a row's, lies row after row.

    XLA chooses so where either way needs no padding.
    """
    last = len(kept) - 1
    whole = cut.order == tuple(range(last + 1)) and cut.blocks % LANES == 0
    return whole and _places(kept) == (last, last - 1)


def unviewed(x: jax.Array, shape: tuple[int, ...], cut: Cut) -> jax.Array:
    """The array of a shape that one of these views is of."""
    if cut.merged:
        return x.reshape(shape)
    x = x.reshape([shape[axis] for axis in cut.order])
    return x.transpose([cut.order.index(axis) for axis in range(len(shape))])


def numbers_in(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    cut: Cut,
    slab: jax.Array,
    row: jax.Array,
    block: jax.Array,
    within: jax.Array,
) -> jax.Array:
    """The numbers of elements in the whole leaf, modulo 2^32, after that of the first.

    Args:
      shape: the leaf's.
      strides: those that its elements are numbered by.
      cut: how it is cut.
      slab: that of the elements.
      row: their rows.
      block: the number of their block in its row.
      within: their places in the block.
    """
    if cut.flat:
        return (block * LANES + row) * cut.size + within
    place = block * cut.size + within
    if cut.merged:
        return row * wrapped(strides[-2]) + place
    *slabs, outer, inner = cut.order
    numbers = row * wrapped(strides[inner if cut.turned else outer]) + place
    for axis in reversed(slabs):
        numbers += jax.lax.rem(slab, jnp.int32(shape[axis])) * wrapped(strides[axis])
        slab = jax.lax.div(slab, jnp.int32(shape[axis]))
    return numbers


def inside_of(
    shape: tuple[int, ...],
    cut: Cut,
    slab: jax.Array,
    row: jax.Array,
    block: jax.Array,
    within: jax.Array,
) -> jax.Array:
    """Whether elements, as in `numbers_in`, are of the leaf."""
    if cut.flat:
        return (block * LANES + row) * cut.size + within < shape[0]
    inside = block * cut.size + within < cut.length
    return inside & (row < cut.rows) if cut.rows % LANES else inside
