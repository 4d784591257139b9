"""A leaf's program on a tile of it, for kernels: with formats that store whole blocks of a tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adamfn.backends.measuring import places_of_scalars
from adamfn.backends.rows import resting_part
from adamfn.core.program import Call
from adamfn.formats import (
    BlockMean,
    Blockwise,
    Factored,
    Format,
    Linear,
    Pair,
    Rounded,
    Stored,
)
from adamfn.formats.base import Seed, halves
from adamfn.formats.blocks import Extremes
from adamfn.formats.noise import Seeds


def kernel_block(format: Format | None) -> int | None:
    """The largest block that a format's kernel works by; 0 for none, None if it has no kernel."""
    if format is None:
        return 0
    if isinstance(format, Blockwise):
        own = type(format).encode is Blockwise.encode and type(format).decode is Blockwise.decode
        return format.block if own else None
    if type(format) is Pair and {type(format.mu), type(format.nu)} <= {Rounded}:
        return 0
    return format.mu.block if _by_factors(format) else None  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]


def _by_factors(format: Format | None) -> bool:
    """Whether a format keeps of nu a few factors for all elements, and mu by blocks."""
    return (
        type(format) is Pair
        and type(format.mu) is Linear
        and type(format.nu) in (Factored, BlockMean)
    )


def factor_places(call: Call) -> frozenset[int]:
    """Which of the arrays that are kept are means of nu over more than a tile."""
    (rows,) = jax.tree.unflatten(call.kept, range(call.arrays_kept))
    return frozenset(
        place
        for part, row in zip(call.program.parts, rows, strict=True)
        if _by_factors(part.format)
        for _, means in row[-1]
        for place in jax.tree.leaves(means)
    )


def with_factors(call: Call, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays of a call, with factors of nu, of which any axis may be 1, in the means' stead.

    What comes behind the call's own stays there.
    """
    (rows,) = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    for k, (part, row) in enumerate(zip(call.program.parts, rows, strict=True)):
        if _by_factors(part.format):
            codec: Any = part.format.nu  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            scales = tuple((own, codec.factors(means)) for own, means in row[-1])
            rows[k] = (*row[:-1], scales)
    return [*jax.tree.leaves(rows), *arrays[call.arrays_kept :]]


def common_block(call: Call, avals: Sequence[Any]) -> int | None:
    """The largest block that a kernel for a call works by; 0 for none, None if none can be made."""
    program, leaves = call.program, avals[3 + call.arrays_kept :]
    found = [kernel_block(part.format) for part in program.parts if part.keeps]
    blocks = {block for block in found if block}
    resting = [part for part in program.parts if part.active and part.rests]
    fits = (
        not call.packed
        and call.leaves == 1
        and None not in found
        and len(blocks) <= 1
        and program.dtype == jnp.float32
        and all(part.local for part in program.parts)
        and (not resting or (len(resting) == 1 and len(leaves[0].shape) > 1))
        and all(aval.dtype in (jnp.float32, jnp.bfloat16) for aval in leaves)
        and leaves[0].size > 0
    )
    return max(blocks, default=0) if fits else None


def cost_of(arrays: Sequence[jax.Array], results: Sequence["Result"]) -> pl.CostEstimate:
    """What a kernel costs, for XLA's scheduler: the bytes that it moves, operations at a guess."""
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    moved += sum(arrays[k].size * jnp.dtype(dtype).itemsize for k, dtype, _ in results)
    size = max(x.size for x in arrays)
    return pl.CostEstimate(flops=100 * size, transcendentals=2 * size, bytes_accessed=moved)


def words_of(numbers: jax.Array, count: jax.Array) -> jax.Array:
    """What a kernel makes noise of, int32: the leaf's seeds, of elements counted from its first."""
    leaf, first = numbers[0]
    seeds = [seed() for seed in Seeds.of(count, leaf)]
    words = [word for seed in seeds for word in (seed.first + first, seed.second)]
    return jnp.stack(words).astype(jnp.int32)


def given_scalars(vector: jax.Array) -> jax.Array:
    """The scalars as a kernel takes them: no array without elements."""
    return vector if vector.size else jnp.pad(vector, (0, 1))


class Result(NamedTuple):
    """A result of a kernel: what it is like, and whether it lies where its operand did."""

    operand: int
    dtype: Any
    in_place: bool


def results_of(call: Call, arrays: Sequence[jax.Array]) -> list[Result]:
    """The results of a kernel for a call of one leaf with these arrays: all but means of nu.

    None of a call that measures, whose kernel returns sums of tiles.
    """
    program, kept = call.program, call.arrays_kept
    if program.measures is not None:
        return []
    places = sorted({*range(kept)} - factor_places(call))
    results = [Result(k, arrays[k].dtype, in_place=True) for k in places]
    if program.update_dtype is not None:
        results.append(Result(kept, program.update_dtype, in_place=False))
    if program.moves:
        results.append(Result(kept + 1, arrays[kept + 1].dtype, in_place=True))
    return results


@dataclass(frozen=True)
class _InTile:
    """A format that stores a tile of whole blocks. What is beyond the leaf is zero to it."""

    format: Any
    inside: jax.Array | None
    over: Extremes

    def encode(self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None) -> Stored:
        """Returns codes, and scales with 1 where a block was; no means."""
        if self.inside is not None:
            mu, nu = (jnp.where(self.inside, x, 0) for x in (mu, nu))
        if isinstance(self.format, Blockwise):
            return self.format.encode_blocks(mu, nu, noise, self.over)
        if not _by_factors(self.format):
            return self.format.encode(mu, nu, noise)
        codes, scale = self.format.mu.encode_blocks(mu, halves(noise)[0], self.over)
        return Stored(codes, None, (scale, None))

    def decode(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        """Returns both moments."""
        if isinstance(self.format, Blockwise):
            return self.format.decode_blocks(stored)
        if not _by_factors(self.format):
            return self.format.decode(stored)
        scale, factors = stored.scales
        mu = self.format.mu.decode_blocks(stored.mu, scale)
        return mu, jnp.broadcast_to(math.prod(jax.tree.leaves(factors)), mu.shape)

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether the format does."""
        return self.format.holds(shape, dtype)


def run_tile(
    call: Call,
    vector: Any,
    words: Any,
    arrays: Sequence[jax.Array],
    numbers: jax.Array,
    inside: jax.Array | None,
    over: Extremes,
    layer: Any,
    layers: int,
) -> list[jax.Array]:
    """Runs a leaf's program on a tile of whole blocks.

    Args:
      call: the leaf's.
      vector: the scalars.
      words: those of `words_of`.
      arrays: the tile of each of the call's arrays, and of what rows move if some may rest.
      numbers: those that the tile's elements have in the whole leaf, after the first, int32.
      inside: whether they are of the leaf; None if all are.
      over: the extremes of the tile's blocks.
      layer: the number of the tile's layer, or those of its blocks' layers, where each layer has
        a scalar of its own.
      layers: how many there are.

    Returns:
      The results; of a call that measures what is to be summed, 0 where nothing is of the leaf.
    """
    parts = tuple(
        part if part.format is None else replace(part, format=_InTile(part.format, inside, over))
        for part in call.program.parts
    )
    program = replace(call.program, parts=parts)
    scalars = [
        vector[place] if isinstance(place, int) else vector[place.start + layer]
        for place in places_of_scalars(program, layers)
    ]
    (kept,) = jax.tree.unflatten(call.kept, arrays[: call.arrays_kept])
    g, *others = arrays[call.arrays_kept :]
    p = others[0] if program.reads_params else None
    moving = None if resting_part(call) is None else others[-1] > 0
    keys = [words[k].astype(jnp.uint32) for k in range(4)]
    seeds = Seeds(lambda: Seed(*keys[:2]), lambda: Seed(*keys[2:]))
    numbers = numbers.astype(jnp.uint32)
    found = jax.tree.leaves(program(seeds, scalars, g, p, kept, numbers, moving))
    if program.measures is None or inside is None:
        return found
    return [jnp.where(inside, found[0], 0)]
