# SPDX-License-Identifier: Apache-2.0
"""The blocks of a leaf with one axis, moved from end to end in memory into a TPU's lanes.

128 neighbouring blocks of `size` elements fill `size` rows of 128 lanes, and a block begins
anywhere in a row. In a kernel's tile each block has a lane to itself. Eight blocks take `size / 16`
whole rows, so the same part of every eighth block is in rows equally far apart: sixteen of these
are moved at a time, in loads and stores with a stride, and then the square of 128 is transposed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from adamfn.backends.tpu.cut import LANES

_PERIOD = 8
"""Blocks that take a whole number of rows, for every size that is a multiple of 16."""
_ALIKE = LANES // _PERIOD


def squares(size: int) -> int:
    """How many squares of 128 by 128 the blocks take, side by side."""
    return -(-size // LANES)


def gather_blocks(rows: Any, start: jax.Array, size: int, square: Any) -> jax.Array:
    """The tile of 128 blocks that are end to end in rows of 32-bit lanes, from row `start` on.

    `square` refers to memory for `squares(size)` squares, one below another.
    """
    apart = size // _ALIKE

    def read(row: int) -> jax.Array:
        return rows[pl.ds(start + min(row, apart - 1), _ALIKE, stride=apart), :]

    for block in range(_PERIOD):
        for at in range(squares(size)):
            part = _from_lane(size * block + LANES * at, read)
            square[pl.ds(LANES * at + block, _ALIKE, stride=_PERIOD), :] = part
    _transpose(size, square)
    return square[:size, :]


def scatter_blocks(tile: jax.Array, rows: Any, start: jax.Array, size: int, square: Any) -> None:
    """The inverse of `gather_blocks`."""
    apart = size // _ALIKE
    square[:size, :] = tile
    _transpose(size, square)
    lane = jax.lax.broadcasted_iota(jnp.int32, (_ALIKE, LANES), 1)

    for row in range(apart):
        first, end = LANES * row // size, -(-LANES * (row + 1) // size)
        parts: list[jax.Array] = []
        for block in range(first, end):

            def read(at: int, block: int = block) -> jax.Array:
                at = min(max(at, 0), squares(size) - 1)
                return square[pl.ds(LANES * at + block, _ALIKE, stride=_PERIOD), :]

            begin = size * block - LANES * row
            part = _from_lane(-begin, read)
            parts.append(jnp.where(lane < begin, parts[-1], part) if parts else part)
        rows[pl.ds(start + row, _ALIKE, stride=apart), :] = parts[-1]


def _from_lane(lane: int, read: Callable[[int], jax.Array]) -> jax.Array:
    """128 lanes, beginning at one of them, of consecutive vectors of 128."""
    at, shift = divmod(lane, LANES)
    if shift == 0:
        return read(at)
    these, next_ones = (tpu.roll(read(k), LANES - shift, 1) for k in (at, at + 1))
    place = jax.lax.broadcasted_iota(jnp.int32, these.shape, 1)
    return jnp.where(place < LANES - shift, these, next_ones)


def _transpose(size: int, square: Any) -> None:
    for at in range(squares(size)):
        here = pl.ds(LANES * at, LANES)
        square[here, :] = square[here, :].T
