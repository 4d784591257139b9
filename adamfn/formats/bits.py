"""Float32 numbers as integers: their bits, and levels evenly spaced in these.

For x > 0 the bits grow with x, and almost as its logarithm: by 2^23 an octave, linearly within. So
levels evenly spaced in bits are nearly logarithmic, and need no exp and no log.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamfn.formats.blocks import Extremes

SMALLEST_NORMAL = 0x00800000  # bits of 2^-126; XLA flushes less to zero on most devices
INFINITY = 0x7F800000  # bits of infinity; those of NaN are larger
SMALLEST_RATIO = 2.0**-50  # of mu to nu's root: its inverse over the smallest root is finite


def bits_of(x: Array) -> Array:
    """The bits of |x|, int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def float_of(bits: Array) -> Array:
    """The float32 number with these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def nearest(x: Array) -> Array:
    """The integer nearest to an |x| below 2^22, int32; ties go to even.

    By an addition that leaves it in the last bits: conversions cost a GPU much. XLA would add a
    constant that was added to x before to the one here, and lose its last bits. The 2 is for ptxas
    (12.9, 13.0): to store the last byte of a sum, it converts the sum to an integer of 8 bits.
    """
    return jax.lax.bitcast_convert_type(x + (1.5 * 2.0**23 + 2), jnp.int32) - 0x4B400002


def near_root(bits: Array) -> Array:
    """A number between sqrt(x) and 1.061 sqrt(x), from the bits of x > 0.

    Halving the bits halves the near-logarithm. To normalize with, it serves as well as the root,
    and is cheap enough that XLA computes it again instead of keeping it in memory.
    """
    return float_of((bits >> 1) + (127 << 22))


class Operations(NamedTuple):
    """A kernel's inverse and root, right to 2 ulp for 0, infinity, and 2^-126 to 2^126.

    Full-range division takes eight GPU instructions; in this range one does.
    """

    inverse: Callable[[Array], Array]
    root: Callable[[Array], Array]


_lent: ContextVar[Operations | None] = ContextVar("lent", default=None)


@contextmanager
def lending(operations: Operations | None) -> Generator[None]:
    """Uses these operations in what is traced inside; None for XLA's."""
    token = _lent.set(operations)
    try:
        yield
    finally:
        _lent.reset(token)


def quotient(x: chex.Numeric, y: Array) -> Array:
    """`x / y`, for y in the range of `Operations`."""
    lent = _lent.get()
    if lent is not None:
        return jnp.multiply(x, lent.inverse(y))
    alike = jnp.shape(x) == y.shape and jnp.result_type(x) == y.dtype
    return jax.lax.div(x, y) if alike else jnp.divide(x, y)  # the first is faster to trace


def root(x: Array) -> Array:
    """The square root of x in the range of `Operations`; that of a smaller number may be 0."""
    lent = _lent.get()
    return jnp.sqrt(x) if lent is None else lent.root(x)


class Levels(NamedTuple):
    """Levels of each block, int32 of (..., 1), in the bits of a float32: `top - j step`, j >= 0."""

    top: Array
    step: Array


def spanning(bits: Array, number: int, over: Extremes, octaves: int = 256) -> Levels:
    """So many levels that span the nonzero elements of each block, from their bits.

    They span no more than `octaves` from the largest down. The last is above 2^-126, so no device
    flushes it to zero.
    """
    least = SMALLEST_NORMAL + number  # the last may come out as much below the smallest element
    top = jnp.maximum(over.largest(bits), least)
    # One less, without the sign: zeros are the largest.
    bottom = jnp.maximum(over.smallest(bits - 1 & 0x7FFFFFFF) + 1, least)
    span = jnp.clip(top - bottom, 0, min(octaves << 23, INFINITY))
    return Levels(top, jnp.maximum(jax.lax.div(span + (number - 2), np.int32(number - 1)), 1))


def round_to_level(
    bits: Array, levels: Levels, number: int, threshold: Array | float, *, unbiased: bool
) -> Array:
    """The index j of one of the two levels around each element, int32, `0 <= j < number`.

    An element is rounded up if its position between the two exceeds the threshold in (0, 1). If
    `unbiased`, that is measured in value, so that a uniform threshold gives x on average; else in
    bits, which gives about log x on average. j is 0 for infinity and NaN, and arbitrary for zero.
    """
    depth = (levels.top - bits).astype(jnp.float32) * quotient(1.0, levels.step.astype(jnp.float32))
    # An element on a level comes out there, whether as this one or as the next.
    j = nearest(jnp.minimum(depth - 0.5, number - 1.5))
    if unbiased:
        above = levels.top - j * levels.step
        upper, lower = float_of(above), float_of(above - levels.step)
        up = float_of(bits) - lower > threshold * (upper - lower)
    else:
        up = depth - j.astype(jnp.float32) < 1 - threshold
    j = jnp.minimum(jnp.where(up, j, j + 1), number - 1)
    return jnp.where(bits >= INFINITY, 0, j)
