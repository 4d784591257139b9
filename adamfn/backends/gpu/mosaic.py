# SPDX-License-Identifier: Apache-2.0
"""The step of a leaf as one kernel on GPU, by Mosaic, for compute capability 9.0 and later.

A tile is four blocks of the leaf, one for each warp. Mosaic masks no loads, so blocks that are left
over are a second tile, which begins earlier and leaves the blocks of the first as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu

from adamfn.backends.tile import LeafCall
from adamfn.formats.bits import Operations, lending
from adamfn.formats.noise import indices_at

WARPS, LANES = 4, 32
_LARGEST_BLOCK = 256

plgpu: Any = mosaic_gpu


def fits_jax() -> bool:
    """Whether this JAX has the interface that the kernel is written for, that of 0.12."""
    return hasattr(plgpu, "store")


def _layout_of(size: int) -> Any:
    """A tile of four blocks with a block to a warp, and consecutive elements to a lane."""
    array: Any = fragmented_array
    found = array.TiledLayout(
        array.Tiling(((WARPS, size), (1, size // LANES))),
        warp_dims=(-4,),
        lane_dims=(-3,),
        vector_dim=-1,
        _check_canonical=False,
    ).canonicalize()
    return plgpu.Layout.TILED(found.tiling, found.warp_dims, found.lane_dims, found.vector_dim)


def _operations(layout: Any) -> Operations:
    """Approximations by one instruction each, and for an inverse a product."""

    def by_instruction(name: str, x: jax.Array) -> jax.Array:
        like = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout)

        @plgpu.inline_mgpu(arg_types=(layout,), return_type=like)
        def found(_: Any, x: Any) -> Any:
            return getattr(x, name)(approx=True)

        return found(plgpu.layout_cast(x, layout))

    def inverse(y: jax.Array) -> jax.Array:
        return jnp.square(by_instruction("rsqrt", y)) if y.ndim else 1 / y

    def root(x: jax.Array) -> jax.Array:
        return by_instruction("sqrt", x) if x.ndim else jnp.sqrt(x)

    return Operations(inverse, root)


def run_leaf(leaf: LeafCall, platform: str) -> list[jax.Array] | None:
    """The results, if the blocks are whole, and so large that a warp can share one.

    On CPU, tiles take turns in a loop.
    """
    u, size, emulated = leaf.u, leaf.size, platform == "cpu"
    if not 0 < size <= _LARGEST_BLOCK or size % LANES or u.shape[-1] % size:
        return None
    if not WARPS * size <= u.size < 2**31:
        return None
    blocks, shape = u.size // size, (WARPS, size)
    full, rest = divmod(blocks, WARPS)
    layout = None if emulated else _layout_of(size)

    def laid(x: jax.Array) -> jax.Array:
        return x if layout is None else plgpu.layout_cast(x, layout)

    def spread(x: jax.Array) -> jax.Array:
        return laid(jax.lax.broadcast_in_dim(x, shape, (0,)))

    def largest(x: jax.Array) -> jax.Array:
        return spread(jnp.max(x, axis=1))

    def load(ref: Any, rows: Any) -> jax.Array:
        by_block = len(ref.shape) == 1
        if layout is None:
            x = ref[rows]
        else:
            at = layout.reduce(1) if by_block else layout
            x = plgpu.load(ref.at[rows], layout=at, optimized=False)
        return spread(x) if by_block else x

    def kernel(start: int, turn: jax.Array, *refs: Any) -> None:
        first = turn * WARPS + start
        rows, step, given = pl.ds(first, WARPS), refs[:3], refs[3:]
        row, within = (laid(jax.lax.broadcasted_iota(jnp.int32, shape, axis)) for axis in (0, 1))
        elements = indices_at((first + row) * size + within, leaf.runs)
        tiles = [load(ref, rows) for ref in given[: len(leaf.arrays)]]
        with lending(None if layout is None else _operations(layout)):
            values = leaf.run_tile(step, tiles, elements, None, largest)
        for k, value in zip(places, values, strict=True):
            target = given[k]
            if start:  # the first of these blocks have taken their step
                old = tiles[k] if k < len(tiles) else load(target, rows)
                value = jnp.where(first + row < full * WARPS, old.astype(value.dtype), value)
            value = value.astype(target.dtype)
            value = value if len(target.shape) == 2 else jnp.max(value, axis=1)
            if layout is None:
                target[rows] = value
            else:
                plgpu.store(target.at[rows], value, optimized=False)

    # The update, which replaces no array, comes after them.
    places = [k if k != leaf.place_of_u else len(leaf.arrays) for k, _ in leaf.results]
    views = [x.reshape((blocks, size) if x.shape == u.shape else (blocks,)) for x in leaf.arrays]
    refs: list[Any] = [jax.new_ref(x) if k in places else x for k, x in enumerate(views)]
    if len(views) in places:
        refs.append(jax.new_ref(jax.lax.empty((blocks, size), leaf.call.program.update_dtype)))
    scalars, count, indices = leaf.operands[:3]
    given = scalars, count.reshape(1), indices.reshape(2).astype(jnp.int32), *refs
    for start, turns in ((0, full), (blocks - WARPS, min(rest, 1))):
        if turns and emulated:
            jax.lax.fori_loop(0, turns, lambda i, _, s=start: kernel(s, i, *given), None)
        elif turns:
            with jax.enable_x64(False):
                plgpu.kernel(
                    lambda *refs, s=start: kernel(s, jax.lax.axis_index("tile"), *refs),
                    grid=(turns,),
                    grid_names=("tile",),
                    kernel_name="adamfn_step",
                )(*given)
    return leaf.shaped([jax.freeze(refs[k]) for k in places])
