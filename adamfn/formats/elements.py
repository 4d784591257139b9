"""The numbers of a leaf's elements, which the noise of rounding is made from.

They count in the order of memory, modulo 2^32. An element of a shard, or of a tile, has the number
that it has in the whole leaf: its strides are the whole leaf's, and its first element's number is
given.
"""

import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

Runs = tuple[tuple[int, int], ...]
"""Lengths and strides of axes, from the outermost: those that lie as one axis would are one."""


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """How many numbers an element and the next along each axis of a whole leaf are apart."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def numbers_of(
    shape: Sequence[int], strides: Sequence[int] | None = None, first: chex.Numeric = 0
) -> jax.Array:
    """The numbers of all elements of an array, uint32 of its shape.

    Args:
      shape: the array's.
      strides: the whole leaf's; None for those of the shape.
      first: the number of the array's first element.

    >>> print(numbers_of((2, 2), strides=(4, 1), first=2))  # the right half of a leaf of (2, 4)
    [[2 3]
     [6 7]]
    """
    strides = strides_of(shape) if strides is None else strides
    numbers = jnp.full(tuple(shape), jnp.asarray(first).astype(jnp.uint32))
    for axis, stride in enumerate(strides):
        along = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
        numbers += along * jnp.uint32(stride % 2**32)
    return numbers


def runs_of(shape: Sequence[int], strides: Sequence[int] | None = None) -> Runs:
    """The axes of an array with these strides; of a whole leaf it is one.

    >>> runs_of((2, 3, 4)), runs_of((2, 3, 4), (24, 8, 1))
    (((24, 1),), ((6, 8), (4, 1)))
    """
    strides = strides_of(shape) if strides is None else strides
    runs: list[tuple[int, int]] = []
    for length, stride in zip(shape, strides, strict=True):
        if runs and runs[-1][1] == length * stride:
            runs[-1] = runs[-1][0] * length, stride
        else:
            runs.append((length, stride))
    return tuple(runs)


def numbers_at(place: jax.Array, runs: Runs) -> jax.Array:
    """The numbers, after that of the first, of what lies at some places of an array.

    Args:
      place: int32, places in the order of the array's own memory.
      runs: the axes of the array.

    Returns:
      int32, wrapped around as uint32 would be.
    """
    numbers = jnp.zeros_like(place)
    for axis in reversed(range(len(runs))):
        length, stride = runs[axis]
        along = jax.lax.rem(place, jnp.int32(length)) if axis else place
        numbers += along * wrapped(stride)
        place = jax.lax.div(place, jnp.int32(length)) if axis else place
    return numbers


def wrapped(stride: int) -> int:
    """The stride modulo 2^32, as an int32."""
    return (stride + 2**31) % 2**32 - 2**31
