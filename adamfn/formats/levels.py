"""Near-logarithmic levels between the smallest and the largest of a block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats.blocks import Extremes
from adamfn.formats.floats import INFINITY, SMALLEST_NORMAL, float_of, nearest
from adamfn.formats.quotients import quotient


class Levels(NamedTuple):
    """The levels of each block, evenly spaced in the bits of a float32: `top - j step`, j >= 0."""

    top: jax.Array
    """int32, (..., 1): bits of the block's largest."""
    step: jax.Array
    """int32, (..., 1), at least 1."""


def spanning(bits: jax.Array, number: int, over: Extremes, octaves: int = 256) -> Levels:
    """The levels that span a block's nonzero elements.

    Args:
      bits: int32, (..., size): bits of numbers not negative.
      number: how many levels.
      over: the extremes of blocks.
      octaves: the widest range they may span, from the largest down.

    Returns:
      The `Levels`. The last is above 2^-126, so that no device takes it for zero.
    """
    least = SMALLEST_NORMAL + number  # the last may come out as much below the smallest element
    top = jnp.maximum(over.largest(bits), least)
    # One less, without the sign: zeros are the largest.
    bottom = jnp.maximum(over.smallest(bits - 1 & 0x7FFFFFFF) + 1, least)
    span = jnp.clip(top - bottom, 0, min(octaves << 23, INFINITY))
    return Levels(top, jnp.maximum(jax.lax.div(span + (number - 2), np.int32(number - 1)), 1))


def round_to_level(
    bits: jax.Array, levels: Levels, number: int, threshold: jax.Array | float, *, unbiased: bool
) -> jax.Array:
    """The number j of one of the two levels around each element, int32, `0 <= j < number`.

    Args:
      bits: int32, (..., size): bits of numbers not negative.
      levels: `spanning(bits, number)`.
      number: how many levels.
      threshold: in (0, 1), what the element's place between the two must exceed to be rounded up.
      unbiased: whether that place is measured in value, (x - lower) / (upper - lower), so that a
        uniform threshold gives x on average; else in bits, which gives about log x on average.

    Returns:
      j. What is not finite gets 0. So does zero, or anything: its level means nothing.
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
