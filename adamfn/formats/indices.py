"""The indices of a leaf's elements, from which the noise of rounding is made.

They follow the order of memory, modulo 2^32. Elements of a shard or a tile have their indices in
the whole leaf: these take the whole leaf's strides, and the index of the first element.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.trees import Numeric, is_known

Runs = tuple[tuple[int, int], ...]
"""Lengths and strides of axes, from the outermost; contiguous axes are merged."""


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
