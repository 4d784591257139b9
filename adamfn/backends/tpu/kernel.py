# SPDX-License-Identifier: Apache-2.0
"""The step of a leaf as one kernel on TPU, by Mosaic.

A tile has 128 rows of the leaf, in the lanes of the TPU's registers, and whole blocks of them along
the sublanes: so a block of any size is reduced and scaled lane by lane. If the leaf is laid out the
other way round, the tile is transposed in the near memory. For a leaf with one axis, a tile has 128
neighbouring blocks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from adamfn.backends.tile import LeafCall
from adamfn.backends.tpu.cut import LANES, cut_of, elements_at
from adamfn.backends.tpu.lanes import squares
from adamfn.backends.tpu.operands import operand_of
from adamfn.formats.blocks import along
from adamfn.formats.noise import runs_of


def run_leaf(leaf: LeafCall, platform: str) -> list[jax.Array] | None:
    """The results, if the leaf can be cut and Pallas lowers it here."""
    u, strides = leaf.u, leaf.strides
    cut = cut_of(u.shape, leaf.block or 0, merges=len(runs_of(u.shape[:-1], strides[:-1])) == 1)
    if cut is None or (platform == "tpu" and u.ndim == 1 and u.size % LANES and not _is_named()):
        return None
    strides = strides[-len(cut.shape) :]
    given = [operand_of(x, x.shape != u.shape, cut) for x in leaf.arrays]

    def kernel(step: Any, *refs: Any) -> None:
        ins, outs = refs[: len(given)], refs[len(given) :][: len(leaf.results)]
        scratch = iter(refs[len(given) + len(leaf.results) :])
        spaces = [next(scratch) if operand.staged else None for operand in given]
        square = {ref.dtype: ref for ref in scratch}
        slab, row, column = (pl.program_id(axis) for axis in range(3))
        first = column * cut.columns
        within = jax.lax.broadcasted_iota(jnp.int32, (cut.size, LANES), 0)
        lane = jax.lax.broadcasted_iota(jnp.int32, (cut.size, LANES), 1)
        for operand, ref, space in zip(given, ins, spaces, strict=True):
            if space is not None:
                # The scales of blocks come for a whole row.
                when = column == 0 if operand.by_block else True
                pl.when(when)(partial(operand.stage, ref, space))

        def one_block(k: jax.Array, _: None) -> None:
            tiles = [
                operand.read(ref if space is None else space, first, k, square)
                for operand, ref, space in zip(given, ins, spaces, strict=True)
            ]
            at = elements_at(cut, strides, slab, row * LANES + lane, first + k, within)
            values = leaf.run_tile(step, tiles, *at, along(0))
            for (like, _), out, value in zip(leaf.results, outs, values, strict=True):
                target = out if spaces[like] is None else spaces[like]
                given[like].write(target, first, k, square, value)

        jax.lax.fori_loop(0, jnp.minimum(cut.columns, cut.blocks - first), one_block, None)
        for (like, _), out in zip(leaf.results, outs, strict=True):
            if spaces[like] is not None:
                given[like].unstage(spaces[like], out)

    small = pl.BlockSpec(memory_space=tpu.SMEM)
    squared = [jnp.float32, jnp.int32] if cut.flat else []
    found = leaf.run_kernel(
        kernel,
        [operand.view for operand in given],
        platform,
        grid=cut.grid,
        in_specs=[small, small, small, *(operand.spec for operand in given)],
        out_specs=[given[k].spec for k, _ in leaf.results],
        scratch_shapes=[
            *(tpu.VMEM((x.staged, LANES), x.dtype) for x in given if x.staged),
            *(tpu.VMEM((LANES * squares(cut.size), LANES), dtype) for dtype in squared),
        ],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel" if cut.flat else "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
    )
    return [given[k].result(x) for (k, _), x in zip(leaf.results, found, strict=True)]


def _is_named() -> bool:
    """Whether Pallas knows the TPU, for which it asks if a vector stays one axis."""
    if not hasattr(tpu, "get_tpu_info"):  # since jax 0.9
        return True
    try:
        tpu.get_tpu_info()
    except ValueError:  # compiled on another machine, and no mesh names the TPU
        return False
    return True
