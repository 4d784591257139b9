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


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of |x|, int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 number of these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def near_root(bits: jax.Array) -> jax.Array:
    """A number between sqrt(x) and 1.061 sqrt(x), from the bits of x > 0.

    Halving the bits halves the near-logarithm. To normalize with, it serves as well as the root,
    and is cheap enough that XLA computes it again instead of keeping it in memory.
    """
    return float_of((bits >> 1) + (127 << 22))
