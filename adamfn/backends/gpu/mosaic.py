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

from adamfn.backends import tile
from adamfn.core.program import Call
from adamfn.formats.bits import Operations, lending
from adamfn.formats.blocks import size_for
from adamfn.formats.noise import indices_at, runs_of

WARPS, LANES = 4, 32
_LARGEST_BLOCK = 256

plgpu: Any = mosaic_gpu


def is_known() -> bool:
    """Whether this JAX has the interface that the kernel is written for, that of 0.12."""
    return hasattr(plgpu, "store")


def can_run(call: Call, avals: Any) -> bool:
    """Whether there is a kernel for a call."""
    block, leaf = tile.common_block(call, avals), avals[3 + call.arrays_kept]
    if not block or tile.means_in(call) or leaf.size >= 2**31:
        return False
    length = leaf.shape[-1]
    size = size_for(length, block)
    fits = size <= _LARGEST_BLOCK and size % LANES == 0 and length % size == 0
    return fits and leaf.size >= WARPS * size


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


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """Replaces `run_call` for a call that it `can_run`. On CPU, tiles take turns in a loop."""
    (vector, count, indices), arrays = operands[:3], operands[3:]
    leaf, results = arrays[call.arrays_kept], tile.results_of(call, arrays)
    size = size_for(leaf.shape[-1], tile.common_block(call, operands) or 0)
    blocks, shape, emulated = leaf.size // size, (WARPS, size), platform == "cpu"
    full, rest = divmod(blocks, WARPS)
    runs = runs_of(leaf.shape, call.strides_of(0, leaf.shape))
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
        elements = indices_at((first + row) * size + within, runs)
        tiles = [load(ref, rows) for ref in given[: len(arrays)]]
        with lending(None if layout is None else _operations(layout)):
            values = tile.run_tile(call, step, tiles, elements, None, largest)
        for k, value in zip(places, values, strict=True):
            target = given[k]
            if start:  # the first of these blocks have taken their step
                old = tiles[k] if k < len(arrays) else load(target, rows)
                value = jnp.where(first + row < full * WARPS, old.astype(value.dtype), value)
            value = value.astype(target.dtype)
            value = value if len(target.shape) == 2 else jnp.max(value, axis=1)
            if layout is None:
                target[rows] = value
            else:
                plgpu.store(target.at[rows], value, optimized=False)

    # The update, which replaces no array, comes after them.
    places = [k if k != call.arrays_kept else len(arrays) for k, _ in results]
    views = [x.reshape((blocks, size) if x.shape == leaf.shape else (blocks,)) for x in arrays]
    refs: list[Any] = [jax.new_ref(x) if k in places else x for k, x in enumerate(views)]
    if call.program.update_dtype is not None:
        refs.append(jax.new_ref(jax.lax.empty((blocks, size), call.program.update_dtype)))
    given = vector, count.reshape(1), indices.reshape(2).astype(jnp.int32), *refs
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
    return [
        jax.freeze(refs[at]).reshape(arrays[k].shape)
        for (k, _), at in zip(results, places, strict=True)
    ]
