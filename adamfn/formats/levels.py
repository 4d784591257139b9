# SPDX-License-Identifier: Apache-2.0
"""`EightBit` and `FourBit`: nu in logarithmic levels, mu in even levels of its ratio to nu's root.

For x > 0 a float32's bits grow almost as the logarithm of x: by 2^23 an octave, linearly within. So
levels evenly spaced in bits are nearly logarithmic, and need no exp and no log.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamfn.formats.bits import INFINITY, bits_of, float_of, near_root, nearest, quotient
from adamfn.formats.blocks import BlockScales, Blockwise, Largest
from adamfn.formats.format import Stored
from adamfn.formats.noise import dither, halves, threshold

_SMALLEST_RATIO = 2.0**-50  # of mu to nu's root: its inverse over the smallest root is finite
_EIGHT_BIT_LEVELS = 255
_NU_LEVELS, _MU_LEVELS = 17, 15  # of FourBit: 17 * 15 and a zero are the 256 values of a byte
_MU_LARGEST = _MU_LEVELS // 2


@dataclass(frozen=True)
class EightBit(Blockwise):
    r"""Two bytes a parameter, and 12 for each block of up to 256 along the last axis.

    mu's codes are int8, -127 to 127; nu's are uint8, 0 for zero and 1 to 255 for levels, upwards.
    With T the bits of a block's largest nu and s its step, codes k > 0 of nu and l of mu decode to

    $$ \nu = \text{float}(T - (255 - k)\, s), \qquad \mu = l \cdot \text{scale} \cdot r(\nu) $$

    The levels span the block's nonzero nu, but 48 octaves (7 decades of gradients) at most; nu
    below rounds up to the last. r(nu) is nu's root, up to 6 per cent. That ratio of moments is
    nearly Adam's update, so mu keeps as many digits where gradients are small as where they are
    large. Rounding is stochastic and unbiased: nu's, and mu's given nu's level.

    Infinity and NaN stay visible: in nu as that element (a NaN makes the block's infinities NaN
    too), in mu as its whole block. A nonzero nu stays nonzero; below 2^-126 it becomes that. mu is
    stored as zero where nu is zero, as the update there would have no bound, and where every mu of
    a block is below 2^-50 of nu's root.

    References:
      Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022 (arXiv 2110.02861), for
      the blocks. The levels are ours, and need no table.

    >>> import jax.numpy as jnp
    >>> gradients = jnp.array([1.0, -0.1, 0.01, 0.0])
    >>> stored = EightBit().encode(0.5 * gradients, gradients**2, None)
    >>> print(stored.nu, EightBit().decode(stored)[0].round(2))
    [255 127   1   0] [ 0.5  -0.05  0.    0.  ]
    """

    dtypes = jnp.int8, jnp.uint8

    @property
    def native_code(self) -> int | None:
        return 3 if type(self) is EightBit and self.block <= 1024 else None

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        return {"lowest": nu == 1, "highest": nu == 255, "largest": jnp.abs(mu) == 127}

    def encode_blocks(self, mu: Array, nu: Array, noise: Array | None, largest: Largest) -> Stored:
        mu_bits, nu_bits = halves(noise)
        nu = bits_of(nu)
        top, step = _spanning(nu, _EIGHT_BIT_LEVELS, largest, octaves=48)
        j = _level(nu, top, step, _EIGHT_BIT_LEVELS, threshold(nu_bits), unbiased=True)
        codes = jnp.where(nu == 0, 0, _EIGHT_BIT_LEVELS - j)

        # The scale is for nu as given, lest a second pass wait for the levels chosen. A level
        # below has a root smaller by this factor at most, with room for roundings.
        fall = 1 + 2.0**-20 + step.astype(jnp.float32) * 2.0**-24
        ratio = mu * jnp.where(nu == 0, 0, quotient(1.0, near_root(nu)))
        widest = fall * float_of(largest(bits_of(ratio)))
        # A smaller ratio is no update. With it, the quotients below could be infinite.
        per_code = quotient(127.0, jnp.maximum(widest, _SMALLEST_RATIO))
        ratio = mu * jnp.where(nu == 0, 0, quotient(per_code, near_root(top - j * step)))
        signed = nearest(ratio + dither(mu_bits))
        return Stored(signed, codes, BlockScales(widest * (1 / 127), float_of(top), step))

    def decode_blocks(self, stored: Any) -> tuple[Array, Array]:
        mu_codes, nu_codes, (scale, top, step) = stored
        codes = nu_codes.astype(jnp.int32)
        nu = jnp.where(codes == 0, 0, bits_of(top) - _EIGHT_BIT_LEVELS * step + codes * step)
        return mu_codes.astype(jnp.float32) * scale * near_root(nu), float_of(nu)


@dataclass(frozen=True)
class FourBit(Blockwise):
    r"""One byte a parameter, and 12 for each block of up to 128 along the last axis.

    The byte, uint8, takes nu's place: 0 where nu is zero; else 1 + 15 j + (l + 7), for a level
    j < 17 of nu and a level l of mu, -7 to 7. With T and s as in `EightBit`, these decode to

    $$ \nu = \text{float}(T - j s), \qquad \mu = l \cdot \text{scale} \cdot r(\nu) $$

    The 17 levels span the block's range, but 40 octaves (6 decades of gradients) at most; nu below
    rounds up to the last. mu is divided by the root of nu before rounding, so that the ratio,
    nearly Adam's update, survives. nu is rounded stochastically, to the right *logarithm* on
    average: with levels an octave or two apart, an unbiased nu is too small so often that updates
    come out half as long again. Rounded to nearest, it would stand still. mu changes by far more
    than its rounding, and goes to the nearest; a b1 above 0.95, with which it would not, is
    refused. Infinity, NaN and zeros are stored as by `EightBit`; an infinity or NaN in nu may take
    neighbours within a level along.

    References:
      Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023 (arXiv 2309.01507), for
      blocks of 128 and the harm of a nu that rounds to zero.

    >>> import jax.numpy as jnp
    >>> gradients = jnp.array([1.0, -0.1, 0.01, 0.0])
    >>> mu, nu = FourBit().decode(FourBit().encode(0.5 * gradients, gradients**2, None))
    >>> print(mu.round(4), nu.round(5))
    [ 0.5    -0.0519  0.0052  0.    ] [1.000e+00 1.031e-02 1.000e-04 0.000e+00]
    """

    block: int = 128
    dtypes = None, jnp.uint8
    largest_b1 = 0.95

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        j, shifted = jnp.divmod(nu.astype(jnp.int32) - 1, _MU_LEVELS)  # of zero -1, 14
        largest = (j >= 0) & (jnp.abs(shifted - _MU_LARGEST) == _MU_LARGEST)
        return {"lowest": j == _NU_LEVELS - 1, "highest": j == 0, "largest": largest}

    def encode_blocks(self, mu: Array, nu: Array, noise: Array | None, largest: Largest) -> Stored:
        nu = bits_of(nu)
        top, step = _spanning(nu, _NU_LEVELS, largest, octaves=40)
        j = _level(nu, top, step, _NU_LEVELS, threshold(halves(noise)[1]), unbiased=False)
        ratio = mu * jnp.where(nu == 0, 0, quotient(1.0, near_root(nu)))
        widest = float_of(largest(bits_of(ratio)))
        per_level = quotient(float(_MU_LARGEST), jnp.maximum(widest, _SMALLEST_RATIO))
        # Divided anew: XLA would keep a quotient that is used twice in memory.
        ratio = mu * jnp.where(nu == 0, 0, quotient(per_level, near_root(nu)))
        codes = jnp.where(nu == 0, 0, 1 + _MU_LEVELS * j + (nearest(ratio) + _MU_LARGEST))
        return Stored(None, codes, BlockScales(widest * (1 / _MU_LARGEST), float_of(top), step))

    def decode_blocks(self, stored: Any) -> tuple[Array, Array]:
        _, codes, (scale, top, step) = stored
        codes = codes.astype(jnp.int32)
        # A quotient by 15. XLA keeps what was divided in memory, and makes a product again.
        j = (codes - 1) * (2**16 // _MU_LEVELS + 1) >> 16
        signed = codes - 1 - _MU_LEVELS * j - _MU_LARGEST
        nu = jnp.where(codes == 0, 0, bits_of(top) - j * step)
        ratio = jnp.where(codes == 0, 0, signed).astype(jnp.float32) * scale
        return ratio * near_root(nu), float_of(nu)


def _spanning(bits: Array, number: int, largest: Largest, octaves: int) -> tuple[Array, Array]:
    """Levels that span the nonzero elements of each block: level j has the bits `top - j step`.

    They span at most `octaves` from the largest down, if it is finite: elements whose gradients
    have been zero for long would stretch them. Both results are int32 of (..., 1).
    """
    # The last may come out as much below the smallest element. XLA flushes less than 2^-126 to 0.
    least = 0x00800000 + number
    top = jnp.maximum(largest(bits), least)
    # The smallest but for zeros, which are the smallest of the complements.
    bottom = jnp.maximum(-largest(-bits & 0x7FFFFFFF) & 0x7FFFFFFF, least)
    most = jnp.where(top < INFINITY, np.int32(octaves << 23), np.int32(INFINITY))
    span = jnp.clip(top - bottom, 0, most)
    return top, jnp.maximum(jax.lax.div(span + (number - 2), np.int32(number - 1)), 1)


def _level(
    bits: Array, top: Array, step: Array, number: int, threshold: Array | float, *, unbiased: bool
) -> Array:
    """The index j of one of the two levels around each element, int32, `0 <= j < number`.

    An element is rounded up if its position between the two exceeds the threshold in (0, 1). If
    `unbiased`, that is measured in value, so that a uniform threshold gives x on average; else in
    bits, which gives about log x on average. j is 0 for infinity and NaN, and arbitrary for zero.
    """
    depth = (top - bits).astype(jnp.float32) * quotient(1.0, step.astype(jnp.float32))
    # An element on a level comes out there, whether as this one or as the next.
    j = nearest(jnp.minimum(depth - 0.5, number - 1.5))
    if unbiased:
        above = top - j * step
        upper, lower = float_of(above), float_of(above - step)
        up = float_of(bits) - lower > threshold * (upper - lower)
    else:
        up = depth - j.astype(jnp.float32) < 1 - threshold
    j = jnp.minimum(jnp.where(up, j, j + 1), number - 1)
    return jnp.where(bits >= INFINITY, 0, j)
