# SPDX-License-Identifier: Apache-2.0
"""The noise of stochastic rounding: random bits for each element, a hash of its index.

Indices follow the order of memory, modulo 2^32. Elements of a shard or a tile have their indices in
the whole leaf: these take the whole leaf's strides, and the index of the first element.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.formats.bits import float_of
from adamfn.trees import Numeric, is_known

Runs = tuple[tuple[int, int], ...]
"""Lengths and strides of axes, from the outermost; contiguous axes are merged."""


def noise(count: Numeric, leaf: Numeric, shape: tuple[int, ...]) -> Array:
    """32 random bits for each element of a leaf, as uint32 of its shape: 16 for each moment.

    A hash of the step's count, the leaf's index and the element's index modulo 2^32, which does
    not depend on sharding: lowbias32 (Wellons, Prospecting for Hash Functions, 2018), with one key
    added first and another xored in later. With one key, two steps would see one sequence shifted.

    >>> print(noise(1, 0, (3,)) == noise(1, 0, (3,)), noise(1, 0, (3,)) == noise(2, 0, (3,)))
    [ True  True  True] [False False False]
    """
    return noise_at(Seed(jnp.asarray(count), jnp.asarray(leaf)), indices_of(shape))


class Seed(NamedTuple):
    """What the noise of a leaf at a step is made from."""

    count: Array
    leaf: Array
    """Its index in the tree, and what is `mixed` in."""


def noise_at(seed: Seed, indices: Array, *, weights: bool = False) -> Array:
    """The `noise` of elements with these indices; weights share none of it with moments."""
    leaf = seed.leaf.astype(jnp.uint32) + jnp.uint32((weights << 31) + 0x9E3779B9 & 0xFFFFFFFF)
    leaf = _hash(leaf, jnp.zeros((), jnp.uint32))
    first = _hash(seed.count.astype(jnp.uint32), leaf)
    return _hash(first + indices, _hash(first + jnp.uint32(0x85EBCA6B), leaf))


def mixed(seeds: Iterable[Numeric]) -> Array:
    """What the seeds of stages add to a leaf's index, uint32; 0 for seeds of 0."""
    zero = jnp.zeros((), jnp.uint32)
    return sum((_hash(jnp.asarray(seed, jnp.uint32), zero) for seed in seeds), zero)


def _hash(x: Array, key: Array) -> Array:
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ key) * jnp.uint32(0x846CA68B)
    return x ^ x >> 16


def halves(noise: Array | None) -> tuple[Array | None, Array | None]:
    """The 16 random bits that round mu and the 16 that round nu, int32; None of None."""
    if noise is None:
        return None, None
    return (noise & 0xFFFF).astype(jnp.int32), (noise >> 16).astype(jnp.int32)


def threshold(bits: Array | None) -> Array | float:
    """A number in (0, 1) from 16 random bits, right to 2^-17, to compare a fraction with."""
    # As the mantissa of a number from 1 to 2: conversions cost a GPU much.
    return 0.5 if bits is None else float_of(bits << 7 | 0x3F800040) - 1


def dither(bits: Array | None) -> Array | float:
    """`threshold` less 1/2: added to a number before rounding to nearest."""
    return threshold(bits) - 0.5


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a whole leaf, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def indices_of(
    shape: Sequence[int], strides: Sequence[int] | None = None, first: Numeric = 0
) -> Array:
    """The index of each element of an array, uint32 of its shape; strides None for a whole leaf.

    >>> print(indices_of((2, 2), strides=(4, 1), first=2))  # the right half of a leaf of (2, 4)
    [[2 3]
     [6 7]]
    """
    indices = jnp.full(tuple(shape), jnp.asarray(first).astype(jnp.uint32))
    for axis, stride in enumerate(strides_of(shape) if strides is None else strides):
        along = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
        known = stride % 2**32 if is_known(stride) else stride
        indices += along * jnp.asarray(known).astype(jnp.uint32)
    return indices


def runs_of(shape: Sequence[int], strides: Sequence[int]) -> Runs:
    """The axes of an array with these strides, merged where contiguous.

    >>> runs_of((2, 3, 4), (24, 8, 1))
    ((6, 8), (4, 1))
    """
    runs: list[tuple[int, int]] = []
    for length, stride in zip(shape, strides, strict=True):
        if runs and runs[-1][1] == length * stride:
            length *= runs.pop()[0]
        runs.append((length, stride))
    return tuple(runs)


def indices_at(place: Array, runs: Runs) -> Array:
    """The indices, less the first element's, at places in the array's memory: int32, wrapped."""
    indices = jnp.zeros_like(place)
    for length, stride in reversed(runs[1:]):
        indices += jax.lax.rem(place, jnp.int32(length)) * wrapped(stride)
        place = jax.lax.div(place, jnp.int32(length))
    return indices + place * wrapped(runs[0][1]) if runs else indices


def wrapped(stride: int) -> int:
    """The stride modulo 2^32, as an int32."""
    return (stride + 2**31) % 2**32 - 2**31
