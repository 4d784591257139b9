"""Float32 numbers as the integers that their bits are.

For x > 0 the bits grow with x, and grow almost as its logarithm: by 2^23 an octave, linearly
within. So levels evenly spaced in bits are nearly logarithmic, and need no exp and no log.
"""

import jax
import jax.numpy as jnp

SMALLEST_NORMAL = 0x00800000
"""Bits of 2^-126. What is smaller, XLA takes for zero on most devices."""

INFINITY = 0x7F800000
"""Bits of infinity; those of NaN are larger."""

SMALLEST_RATIO = 2.0**-50
"""Of a moment to the other's root: 2^50 over the root of the smallest normal is still finite."""


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of |x|, int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 number of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def nearest(x: jax.Array) -> jax.Array:
    """The integer nearest to an |x| below 2^22, int32, of two as near the even one.

    By an addition that leaves it in the last bits: conversions cost a GPU much. XLA would add a
    constant that was added to x before to the one here, and lose its last bits. The 2 is for ptxas
    (12.9, 13.0): to store the last byte of a sum, it converts the sum to an integer of 8 bits.
    """
    return jax.lax.bitcast_convert_type(x + (1.5 * 2.0**23 + 2), jnp.int32) - 0x4B400002


def near_root(bits: jax.Array) -> jax.Array:
    """A number between sqrt(x) and 1.061 sqrt(x), from the bits of x > 0.

    Halving the bits halves the near-logarithm. To normalize with, it serves as well as the root,
    and is cheap enough that XLA computes it again instead of keeping it in memory.
    """
    return float_of((bits >> 1) + (127 << 22))
