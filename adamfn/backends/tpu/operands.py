"""The arrays of a leaf as its kernel on TPU takes them, and their way into a tile and back."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adamfn.backends.tpu.cut import LANES, Cut, lies_by_rows, unviewed, viewed
from adamfn.backends.tpu.lanes import gather_blocks, scatter_blocks


class Operand(NamedTuple):
    """An array as the kernel takes it."""

    view: jax.Array
    spec: pl.BlockSpec
    staged: int
    """Rows of 128 that it is brought into in the near memory; 0 if it is used where it comes."""
    turned: bool
    """Whether it is turned over on its way there: its rows lie as rows, and not in the lanes."""
    by_block: bool
    """Whether it has one number for all of a row, or of a block in it."""

    @property
    def dtype(self) -> Any:
        """That of its place in the near memory, of 32 bits."""
        real = jnp.issubdtype(self.view.dtype, jnp.floating)
        return jnp.dtype(jnp.float32 if real else jnp.int32)


def operand(x: jax.Array, leaf: tuple[int, ...], cut: Cut) -> Operand:
    """An array like the leaf, or what is kept of its blocks."""
    by_block = x.shape != leaf
    if cut.flat:
        each = cut.columns if by_block else cut.width  # in a lane
        staged = 0 if by_block else cut.width
        if leaf[0] % LANES:  # which only a copy would cut into rows
            spec = pl.BlockSpec((each * LANES,), lambda s, i, j: (j,))
            return Operand(x, spec, staged, turned=False, by_block=by_block)
        if by_block:
            spec = pl.BlockSpec((1, each * LANES), lambda s, i, j: (0, j))
            return Operand(x.reshape(1, -1), spec, staged, turned=False, by_block=True)
        spec = pl.BlockSpec((each, LANES), lambda s, i, j: (j, 0))
        return Operand(x.reshape(-1, LANES), spec, staged, turned=False, by_block=False)
    view = viewed(x, cut)
    if by_block and lies_by_rows(x.shape, cut):
        spec = pl.BlockSpec((None, LANES, cut.blocks), lambda s, i, j: (s, i, 0))
        return Operand(view, spec, cut.blocks, turned=True, by_block=True)
    if by_block:
        view = view if cut.turned else view.transpose(0, 2, 1)
        spec = pl.BlockSpec((None, cut.blocks, LANES), lambda s, i, j: (s, 0, i))
        return Operand(view, spec, 0, turned=False, by_block=True)
    if cut.turned:
        spec = pl.BlockSpec((None, cut.width, LANES), lambda s, i, j: (s, j, i))
        return Operand(view, spec, cut.width, turned=False, by_block=False)
    spec = pl.BlockSpec((None, LANES, cut.width), lambda s, i, j: (s, i, j))
    return Operand(view, spec, cut.width, turned=True, by_block=False)


def factor(x: jax.Array, cut: Cut) -> Operand:
    """A factor of the leaf, of which any axis may be 1."""
    only = math.prod(x.shape[a] for a in cut.order[:-2]) == 1  # one for all slabs
    view = viewed(x, cut)
    view = view.transpose(0, 2, 1) if cut.turned else view  # rows before the last axis
    if view.shape[2] == 1:
        view = jnp.broadcast_to(view, (view.shape[0], cut.rows, 1)).transpose(0, 2, 1)
        spec = pl.BlockSpec((None, 1, LANES), lambda s, i, j: (0 if only else s, 0, i))
        return Operand(view, spec, 0, turned=False, by_block=True)
    shared = view.shape[1] == 1
    spec = pl.BlockSpec(
        (None, 1 if shared else LANES, cut.width),
        lambda s, i, j: (0 if only else s, 0 if shared else i, j),
    )
    return Operand(view, spec, cut.width, turned=True, by_block=False)


def unview(own: Operand, x: jax.Array, shape: tuple[int, ...], cut: Cut) -> jax.Array:
    """The array of a shape that one like the operand's view is of."""
    if cut.flat:
        return x.reshape(shape)
    upright = own.by_block and not own.turned and not cut.turned
    return unviewed(x.transpose(0, 2, 1) if upright else x, shape, cut)


def stage(own: Operand, ref: Any, space: Any) -> None:
    """Brings an operand's part into the near memory."""
    x = ref[...].astype(space.dtype)
    if own.turned:
        x = jnp.broadcast_to(x, (LANES, own.staged)).T
    space[...] = x.reshape(space.shape)


def unstage(own: Operand, space: Any, ref: Any) -> None:
    """Brings what `stage` brought to where it came from."""
    x = space[...].T if own.turned else space[...]
    ref[...] = x.astype(ref.dtype).reshape(ref.shape)


def read(own: Operand, ref: Any, cut: Cut, first: jax.Array, k: jax.Array, square: Any) -> Any:
    """The tile of an operand that belongs to some blocks.

    Args:
      own: the operand.
      ref: to its place in the near memory.
      cut: the leaf's.
      first: the first block of this part of the leaf.
      k: the number of the blocks, from there.
      square: memory for `gather_blocks`, by dtype.
    """
    if own.by_block:
        return _of_blocks(own, ref, cut, first, k)[...].reshape(1, LANES)
    start = pl.multiple_of(k * cut.size, 16)
    if cut.flat:
        return gather_blocks(ref, start, cut.size, square[own.dtype])
    return ref[pl.ds(start, cut.size), :]


def write(
    own: Operand, ref: Any, cut: Cut, first: jax.Array, k: jax.Array, square: Any, tile: jax.Array
) -> None:
    """Puts what became of a tile where `read` took it from."""
    if own.by_block:
        here = _of_blocks(own, ref, cut, first, k)
        here[...] = tile.reshape(here.shape)
        return
    start, tile = pl.multiple_of(k * cut.size, 16), tile.astype(own.dtype)
    if cut.flat:
        scatter_blocks(tile, ref, start, cut.size, square[own.dtype])
    else:
        ref[pl.ds(start, cut.size), :] = tile


def _of_blocks(own: Operand, ref: Any, cut: Cut, first: jax.Array, k: jax.Array) -> Any:
    if cut.flat:
        here = pl.ds(pl.multiple_of(k * LANES, LANES), LANES)
        return ref.at[here] if own.view.ndim == 1 else ref.at[:, here]
    return ref.at[pl.ds(0 if ref.shape[0] == 1 else first + k, 1), :]
