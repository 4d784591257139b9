"""Weights in bfloat16, and the lower bits of the float32 weights that they stand for.

A float32 weight is a word of 32 bits. Its bfloat16 is the nearest to it, and its correction what is
left, an integer in units of the last bit that is kept: int8 where 24 bits are kept, int16 where all
32 are. So bfloat16 and correction make the word again, to the bit.
"""

from typing import Any

import jax
import jax.numpy as jnp

from adamfn.formats.floats import INFINITY, float_of

CORRECTIONS: dict[int, Any] = {16: None, 24: jnp.int8, 32: jnp.int16}
"""The dtype of corrections, by how many bits of a weight are kept; None for no correction."""

_MANTISSA = 0x7FFFFF


def joined(weight: jax.Array, correction: jax.Array, bits: int) -> jax.Array:
    """The float32 weight of a bfloat16 one, given in float32, and its correction."""
    lower = correction.astype(jnp.int32) << (32 - bits)
    return float_of(_word(weight) + lower)


def split(
    x: jax.Array, bits: int, random: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
    """A float32 weight as a bfloat16 one and a correction, both in float32.

    Args:
      x: the weight.
      bits: how many of its bits are kept: 16, 24 or 32.
      random: int32, what is added to the word before bits are dropped; None rounds to nearest.
    """
    word = _word(x)
    dropped = (1 << (32 - bits)) - 1
    rounded = (word + ((dropped + 1) >> 1 if random is None else random)) & ~dropped
    nearest = (rounded + 0x8000) & ~0xFFFF
    finite = (word & INFINITY) != INFINITY  # what is not has no bits to be kept
    correction = jnp.where(finite, (rounded - nearest) >> (32 - bits), 0)
    return jnp.where(finite, float_of(nearest), x), correction.astype(jnp.float32)


def split_sum(
    p: jax.Array, u: jax.Array, bits: int, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`split` of `p + u` as it is in exact arithmetic, rounded to so many bits without bias.

    The sum in float32 has lost the most of an update of 1e-8 to a weight of 1 already, the same way
    at each step. What it lost (Knuth's two-sum) is rounded with the rest, by the same random bits.

    Args:
      p: the weight.
      u: the update.
      bits: 16 or 24.
      noise: uint32 of their shape.
    """
    total = p + u
    added = total - p
    lost = (p - (total - added)) + (u - added)
    word = _word(total)
    exponent = word & INFINITY
    units = lost * jnp.copysign(2.0**23, total) * float_of((254 << 23) - exponent)
    # Below a power of two, the numbers lie twice as close.
    units = jnp.where((word & _MANTISSA == 0) & (units < 0), 2 * units, units)
    share = (noise >> (bits - 16) & 0xFFFF).astype(jnp.int32).astype(jnp.float32) * 2.0**-16
    carried = jnp.floor(share + units).astype(jnp.int32)
    return split(total, bits, (noise >> bits).astype(jnp.int32) + carried)


def _word(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
