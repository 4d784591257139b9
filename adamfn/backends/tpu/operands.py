# SPDX-License-Identifier: Apache-2.0
"""The arrays of a leaf as its kernel on TPU takes them, and their way into a tile and back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adamfn.backends.tpu.cut import LANES, Cut, is_row_major
from adamfn.backends.tpu.lanes import gather_blocks, scatter_blocks


class Operand(NamedTuple):
    """An array as the kernel takes it: of the leaf's shape, or with a number for each block."""

    cut: Cut
    shape: tuple[int, ...]
    view: jax.Array
    spec: pl.BlockSpec
    by_block: bool
    staged: int
    """The rows of 128 of its copy in the near memory; 0 if it is used where it arrives."""
    turned: bool = False
    """Whether it is transposed on its way there: its rows are not in the lanes."""

    @property
    def dtype(self) -> Any:
        """The dtype of its copy in the near memory, of 32 bits."""
        real = jnp.issubdtype(self.view.dtype, jnp.floating)
        return jnp.dtype(jnp.float32 if real else jnp.int32)

    def stage(self, ref: Any, space: Any) -> None:
        """Copies its part into its space in the near memory."""
        x = ref[...].astype(space.dtype)
        x = jnp.broadcast_to(x, (LANES, self.staged)).T if self.turned else x
        space[...] = x.reshape(space.shape)

    def unstage(self, space: Any, ref: Any) -> None:
        """The inverse of `stage`."""
        x = space[...].T if self.turned else space[...]
        ref[...] = x.astype(ref.dtype).reshape(ref.shape)

    def read(self, ref: Any, first: jax.Array, k: jax.Array, squares: Any) -> jax.Array:
        """The tile for the blocks `first + k`, from a reference in the near memory."""
        if self.by_block:
            return self._of_blocks(ref, first, k)[...].reshape(1, LANES)
        start = pl.multiple_of(k * self.cut.size, 16)
        if self.cut.flat:
            return gather_blocks(ref, start, self.cut.size, squares[self.dtype])
        return ref[pl.ds(start, self.cut.size), :]

    def write(
        self, ref: Any, first: jax.Array, k: jax.Array, squares: Any, tile: jax.Array
    ) -> None:
        """The inverse of `read`."""
        if self.by_block:
            here = self._of_blocks(ref, first, k)
            here[...] = tile.reshape(here.shape)
            return
        start, tile = pl.multiple_of(k * self.cut.size, 16), tile.astype(self.dtype)
        if self.cut.flat:
            scatter_blocks(tile, ref, start, self.cut.size, squares[self.dtype])
        else:
            ref[pl.ds(start, self.cut.size), :] = tile

    def _of_blocks(self, ref: Any, first: jax.Array, k: jax.Array) -> Any:
        if not self.cut.flat:
            return ref.at[pl.ds(first + k, 1), :]
        here = pl.ds(pl.multiple_of(k * LANES, LANES), LANES)
        return ref.at[here] if self.view.ndim == 1 else ref.at[:, here]

    def result(self, x: jax.Array) -> jax.Array:
        """A result like the view, in the shape of the array."""
        cut = self.cut
        if cut.flat:
            return x.reshape(self.shape)
        upright = self.by_block and not self.turned and not cut.turned
        x = x.transpose(0, 2, 1) if upright else x
        merged = *cut.shape[:-1], self.shape[-1]
        x = x.reshape([merged[axis] for axis in cut.order])
        inverse = [cut.order.index(axis) for axis in range(len(cut.order))]
        return x.transpose(inverse).reshape(self.shape)


def operand_of(x: jax.Array, by_block: bool, cut: Cut) -> Operand:
    """The operand for an array of the leaf's shape, or for the scales of its blocks."""
    staged = 0 if by_block else cut.width
    if cut.flat:
        each = (cut.columns if by_block else cut.width) * LANES
        if cut.shape[0] % LANES:  # only a copy would have rows
            view, spec = x, pl.BlockSpec((each,), lambda s, i, j: (j,))
        elif by_block:
            view, spec = x.reshape(1, -1), pl.BlockSpec((1, each), lambda s, i, j: (0, j))
        else:
            rows = x.reshape(-1, LANES)
            view, spec = rows, pl.BlockSpec((cut.width, LANES), lambda s, i, j: (j, 0))
        return Operand(cut, x.shape, view, spec, by_block, staged)
    view = x.reshape(*cut.shape[:-1], x.shape[-1])
    by_row = by_block and is_row_major(view.shape, cut)
    view = view.transpose(cut.order).reshape(-1, *(view.shape[axis] for axis in cut.order[-2:]))
    if by_row:
        spec = pl.BlockSpec((None, LANES, cut.blocks), lambda s, i, j: (s, i, 0))
        return Operand(cut, x.shape, view, spec, by_block, cut.blocks, turned=True)
    if by_block:
        view = view if cut.turned else view.transpose(0, 2, 1)
        spec = pl.BlockSpec((None, cut.blocks, LANES), lambda s, i, j: (s, 0, i))
    elif cut.turned:
        spec = pl.BlockSpec((None, cut.width, LANES), lambda s, i, j: (s, j, i))
    else:
        spec = pl.BlockSpec((None, LANES, cut.width), lambda s, i, j: (s, i, j))
    return Operand(cut, x.shape, view, spec, by_block, staged, not (by_block or cut.turned))
