# SPDX-License-Identifier: Apache-2.0
"""Weights in bfloat16, and the lower bits of the float32 weights that they stand for.

A float32 weight is a word of 32 bits. Its bfloat16 is the nearest one, and its correction is the
difference, an integer in units of the last bit that is kept: int8 if 24 bits are kept, int16 if all
32 are. So bfloat16 and correction give back the word, to the bit.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.formats.bits import INFINITY, float_of

_MANTISSA = 0x7FFFFF


@dataclass(frozen=True)
class Weights:
    """How a bfloat16 parameter is decoded before a step, and encoded after it.

    It is the formula of `round_weights`, the last stage of a program.
    """

    bits: Literal[16, 24, 32]
    """How many bits of a weight are kept."""

    @property
    def correction(self) -> Any:
        """The dtype of corrections; None if there are none."""
        return {16: None, 24: jnp.int8, 32: jnp.int16}[self.bits]

    def decode(self, stored: Array, correction: Array | None = None) -> Array:
        """The float32 weight of a bfloat16 one, given in float32, and its correction."""
        if correction is None:
            return stored
        return float_of(_word(stored) + (correction.astype(jnp.int32) << (32 - self.bits)))

    def split(self, x: Array, random: Array | None = None) -> tuple[Array, Array]:
        """A float32 weight as a bfloat16 one and a correction, both in float32.

        `random`, int32, is added to the word before bits are dropped; None rounds to nearest.
        """
        word, dropped = _word(x), (1 << (32 - self.bits)) - 1
        rounded = (word + ((dropped + 1) >> 1 if random is None else random)) & ~dropped
        nearest = (rounded + 0x8000) & ~0xFFFF
        finite = (word & INFINITY) != INFINITY  # infinity and NaN have no bits to keep
        correction = jnp.where(finite, (rounded - nearest) >> (32 - self.bits), 0)
        return jnp.where(finite, float_of(nearest), x), correction.astype(jnp.float32)

    def __call__(
        self, u: Array, weight: Array, stored: Array, noise: Array, *corrections: Array
    ) -> tuple[Array, ...]:
        """The update that lands on the new bfloat16 weight, and the new correction, if any.

        The weight is from `decode`, and the bfloat16 that is stored is given in float32. Noise is
        uint32 of their shape, and a correction the old one.
        """
        exact = self.bits == 32
        new, lower = self.split(weight + u) if exact else self._split_sum(weight, u, noise)
        u = new - stored
        # From 1 to 1e-9 in one step, the sum of weight and update misses: no correction fits.
        lands = (stored + u).astype(jnp.bfloat16).astype(jnp.float32) == new
        return (u, jnp.where(lands, lower, 0)) if corrections else (u,)

    def _split_sum(self, p: Array, u: Array, noise: Array) -> tuple[Array, Array]:
        """`split` of `p + u` in exact arithmetic, rounded without bias.

        The sum in float32 has already lost most of an update of 1e-8 to a weight of 1, the same way
        at each step. The loss (Knuth's two-sum) is rounded with the rest, by the same random bits.
        """
        bits, total = self.bits, p + u
        added = total - p
        lost = (p - (total - added)) + (u - added)
        word = _word(total)
        exponent = word & INFINITY
        units = lost * jnp.copysign(2.0**23, total) * float_of((254 << 23) - exponent)
        # Below a power of two, neighbouring numbers are twice as close.
        units = jnp.where((word & _MANTISSA == 0) & (units < 0), 2 * units, units)
        share = (noise >> (bits - 16) & 0xFFFF).astype(jnp.int32).astype(jnp.float32) * 2.0**-16
        carried = jnp.floor(share + units).astype(jnp.int32)
        return self.split(total, (noise >> bits).astype(jnp.int32) + carried)


def _word(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)
