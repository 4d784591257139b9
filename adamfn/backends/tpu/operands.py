"""The arrays of a leaf as its kernel on TPU takes them, and their way into a tile and back."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adamfn.backends.tpu.cut import LANES, Cut, is_row_major, unviewed, viewed
from adamfn.backends.tpu.lanes import gather_blocks, scatter_blocks


class Operand(NamedTuple):
    """An array as the kernel takes it."""

    view: jax.Array
    spec: pl.BlockSpec
    staged: int
    """The rows of 128 of its copy in the near memory; 0 if it is used where it arrives."""
    turned: bool
    """Whether it is transposed on its way there: its rows are not in the lanes."""
    by_block: bool
    """Whether it has one number for a whole row, or for a block of it."""

    @property
    def dtype(self) -> Any:
        """The dtype of its copy in the near memory, of 32 bits."""
        real = jnp.issubdtype(self.view.dtype, jnp.floating)
        return jnp.dtype(jnp.float32 if real else jnp.int32)


def operand_of(x: jax.Array, cut: Cut) -> Operand:
    """The operand for an array of the leaf's shape, or for the scales of its blocks."""
    by_block = x.shape != cut.shape
    if cut.flat:
        each = cut.columns if by_block else cut.width  # in a lane
        staged = 0 if by_block else cut.width
        if cut.shape[0] % LANES:  # only a copy would have rows
            spec = pl.BlockSpec((each * LANES,), lambda s, i, j: (j,))
            return Operand(x, spec, staged, turned=False, by_block=by_block)
        if by_block:
            spec = pl.BlockSpec((1, each * LANES), lambda s, i, j: (0, j))
            return Operand(x.reshape(1, -1), spec, staged, turned=False, by_block=True)
        spec = pl.BlockSpec((each, LANES), lambda s, i, j: (j, 0))
        return Operand(x.reshape(-1, LANES), spec, staged, turned=False, by_block=False)
    view = viewed(x, cut)
    if by_block and is_row_major(x.shape, cut):
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


def factor_of(x: jax.Array, cut: Cut) -> Operand:
    """The operand for a factor of the leaf, which has some axes of 1."""
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


def result_of(operand: Operand, x: jax.Array, shape: tuple[int, ...], cut: Cut) -> jax.Array:
    """A result like the operand's view, as an array of this shape."""
    if cut.flat:
        return x.reshape(shape)
    upright = operand.by_block and not operand.turned and not cut.turned
    return unviewed(x.transpose(0, 2, 1) if upright else x, shape, cut)


def stage(operand: Operand, ref: Any, space: Any) -> None:
    """Copies an operand's part into its space in the near memory."""
    x = ref[...].astype(space.dtype)
    if operand.turned:
        x = jnp.broadcast_to(x, (LANES, operand.staged)).T
    space[...] = x.reshape(space.shape)


def unstage(operand: Operand, space: Any, ref: Any) -> None:
    """The inverse of `stage`."""
    x = space[...].T if operand.turned else space[...]
    ref[...] = x.astype(ref.dtype).reshape(ref.shape)


def read(
    operand: Operand, ref: Any, cut: Cut, first: jax.Array, k: jax.Array, squares: Any
) -> jax.Array:
    """The tile of an operand for the blocks `first + k`, from its reference in the near memory."""
    if operand.by_block:
        return _of_blocks(operand, ref, cut, first, k)[...].reshape(1, LANES)
    start = pl.multiple_of(k * cut.size, 16)
    if cut.flat:
        return gather_blocks(ref, start, cut.size, squares[operand.dtype])
    return ref[pl.ds(start, cut.size), :]


def write(
    operand: Operand,
    ref: Any,
    cut: Cut,
    first: jax.Array,
    k: jax.Array,
    squares: Any,
    tile: jax.Array,
) -> None:
    """The inverse of `read`."""
    if operand.by_block:
        here = _of_blocks(operand, ref, cut, first, k)
        here[...] = tile.reshape(here.shape)
        return
    start, tile = pl.multiple_of(k * cut.size, 16), tile.astype(operand.dtype)
    if cut.flat:
        scatter_blocks(tile, ref, start, cut.size, squares[operand.dtype])
    else:
        ref[pl.ds(start, cut.size), :] = tile


def _of_blocks(operand: Operand, ref: Any, cut: Cut, first: jax.Array, k: jax.Array) -> Any:
    if cut.flat:
        here = pl.ds(pl.multiple_of(k * LANES, LANES), LANES)
        return ref.at[here] if operand.view.ndim == 1 else ref.at[:, here]
    return ref.at[pl.ds(0 if ref.shape[0] == 1 else first + k, 1), :]
