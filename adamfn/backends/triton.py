"""The step of a leaf as one kernel on GPU, by Triton.

A tile is some whole blocks of the leaf, a block in a row. An array lies in memory in the order of
its elements, so that leaves of every shape are cut alike, and copied never.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from adamfn.backends.tile import (
    common_block,
    cost_of,
    factor_places,
    results_of,
    run_tile,
    words_of,
)
from adamfn.formats.blocks import along, size_for
from adamfn.formats.elements import numbers_at, runs_of
from adamfn.program import Call
from adamfn.varying import shape_like

_ELEMENTS = 1024
"""In a tile: eight for each thread."""


def can_run(call: Call, avals: Any) -> bool:
    """Whether there is a kernel for a call."""
    block = common_block(call, avals)
    return (
        block is not None
        and block <= _ELEMENTS
        and avals[3 + call.arrays_kept].size < 2**31
        and not factor_places(call)  # XLA makes few passes of those, and the same means
    )


def run_leaf(call: Call, *operands: jax.Array, interpret: bool = False) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`."""
    vector, count, numbers, *arrays = operands
    leaf = arrays[call.arrays_kept]
    block_size = common_block(call, operands)
    assert block_size is not None
    length = leaf.shape[-1] if block_size else leaf.size
    size = size_for(length, block_size) if block_size else _ELEMENTS
    across = pl.cdiv(length, size)
    blocks = leaf.size // length * across
    width = 2 ** math.ceil(math.log2(size))
    height = _ELEMENTS // width
    results = results_of(call, arrays)
    strides = call.strides_of(0, leaf.shape)
    runs, rows = runs_of(leaf.shape, strides), runs_of(leaf.shape[:-1], strides[:-1])

    def kernel(vector: Any, words: Any, *refs: Any) -> None:
        block = pl.program_id(0) * height + jax.lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        within = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
        if length % size:
            row = jax.lax.div(block, jnp.int32(across))
            start = (block - row * across) * size
            elements, inside = row * length + start + within, start + within < length
        else:
            elements, inside = block * size + within, within < size
        inside = (inside & (within < size) & (block < blocks)) | jnp.zeros(elements.shape, bool)
        places = {blocks: (block, block < blocks), leaf.size: (elements, inside)}
        tiles = [
            triton.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))
            for ref in refs[: len(arrays)]
            for at, mask in [places[ref.size]]
        ]
        if len(runs) == 1:
            numbers = elements
        elif block_size:
            row = jax.lax.div(block, jnp.int32(across))
            start = (block - row * across) * size
            numbers = numbers_at(row, rows) + start + within
        else:
            numbers = numbers_at(elements, runs)
        values = run_tile(call, vector, words, tiles, words[2] + numbers, inside, along(1))
        for ref, value in zip(refs[len(arrays) :], values, strict=True):
            at, mask = places[ref.size]
            triton.store(ref.at[at], value.astype(ref.dtype), mask=mask)

    views = [array.reshape(-1) for array in arrays]
    found = pl.pallas_call(
        kernel,
        out_shape=[shape_like(views[k], dtype) for k, dtype, _ in results],
        grid=(pl.cdiv(blocks, height),),
        input_output_aliases={2 + k: at for at, (k, _, same) in enumerate(results) if same},
        compiler_params=triton.CompilerParams(num_warps=4),
        cost_estimate=cost_of(views, results),
        interpret=interpret,
        name="adamfn_step",
    )(vector, words_of(numbers, count), *views)
    return [x.reshape(arrays[k].shape) for (k, *_), x in zip(results, found, strict=True)]
