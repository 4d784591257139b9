"""`FourBit`: both moments in one byte, by blocks."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from adamfn.formats import bits
from adamfn.formats.bits import bits_of, float_of, near_root, quotient
from adamfn.formats.blocks import BlockScales, Blockwise, Extremes
from adamfn.formats.format import Stored
from adamfn.formats.noise import halves, threshold

_NU_LEVELS, _MU_LEVELS = 17, 15  # 17 * 15 and a zero are the 256 values of a byte
_MU_LARGEST = _MU_LEVELS // 2
_OCTAVES = 40
_RECIPROCAL = 2**16 // _MU_LEVELS + 1


@dataclass(frozen=True)
class FourBit(Blockwise):
    r"""One byte a parameter, and 12 for each block of up to 128 along the last axis.

    The byte, uint8, takes nu's place: 0 where nu is zero; else 1 + 15 j + (l + 7), for a level
    j of nu and a level l of mu. With T the bits of a block's largest nu and s its step, they are

    $$
    \nu = \text{float}(T - j s), \quad 0 \le j < 17; \qquad
    \mu = l \cdot \text{scale} \cdot r(\nu), \quad -7 \le l \le 7
    $$

    The 17 levels span the block's range, but 40 octaves (6 decades of gradients) at most; what is
    below rounds up to the last. r(nu) is nu's root, up to 6 per cent. `encode` divides mu by the
    root of nu before rounding, so that the ratio, nearly Adam's update, survives nu's rounding.

    nu is rounded stochastically, to the right *logarithm* on average: with levels an octave or two
    apart, an unbiased nu spends so much time too small that updates come out half as long again.
    Rounded to nearest, it would stand still. mu changes by far more than its rounding, and goes to
    the nearest.

    Infinity and NaN stay visible: in nu as that element, perhaps with neighbours within a level of
    it; in mu as its whole block. Where nu is zero, mu is stored as zero, and where every mu of a
    block is below 2^-50 of nu's root.

    Attributes:
      block: the largest size of a block, a multiple of 16.

    References:
      Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023 (arXiv 2309.01507), for
      blocks of 128 and the harm of a nu that rounds to zero. The code is another.

    >>> import jax.numpy as jnp
    >>> gradients = jnp.array([1.0, -0.1, 0.01, 0.0])
    >>> mu, nu = FourBit().decode(FourBit().encode(0.5 * gradients, gradients**2, None))
    >>> print(mu.round(4), nu.round(5))
    [ 0.5    -0.0519  0.0052  0.    ] [1.000e+00 1.031e-02 1.000e-04 0.000e+00]
    """

    block: int = 128
    dtypes = None, jnp.uint8

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        """Where levels are at an end of their range."""
        codes = nu.astype(jnp.int32)
        level, stored = (codes - 1) % _MU_LEVELS, codes > 0
        return {
            "lowest": codes > _MU_LEVELS * (_NU_LEVELS - 1),
            "highest": stored & (codes <= _MU_LEVELS),
            "largest": stored & ((level == 0) | (level == _MU_LEVELS - 1)),
        }

    def encode_blocks(self, mu: Array, nu: Array, noise: Array | None, over: Extremes) -> Stored:
        """Returns the codes of both in nu's place, and `BlockScales`."""
        _, nu_bits = halves(noise)
        nu = bits_of(nu)
        levels = bits.spanning(nu, _NU_LEVELS, over, _OCTAVES)
        j = bits.round_to_level(nu, levels, _NU_LEVELS, threshold(nu_bits), unbiased=False)

        ratio = mu * jnp.where(nu == 0, 0, quotient(1.0, near_root(nu)))
        largest = float_of(over.largest(bits_of(ratio)))
        per_level = quotient(float(_MU_LARGEST), jnp.maximum(largest, bits.SMALLEST_RATIO))
        # Divided anew: XLA would keep a quotient that is used twice in memory.
        ratio = mu * jnp.where(nu == 0, 0, quotient(per_level, near_root(nu)))
        codes = 1 + _MU_LEVELS * j + (bits.nearest(ratio) + _MU_LARGEST)
        codes = jnp.where(nu == 0, 0, codes)
        scales = BlockScales(largest * (1 / _MU_LARGEST), float_of(levels.top), levels.step)
        return Stored(None, codes, scales)

    def decode_blocks(self, stored: Any) -> tuple[Array, Array]:
        """Returns both moments in float32."""
        _, codes, (scale, top, step) = stored
        codes = codes.astype(jnp.int32)
        # A quotient by 15. XLA keeps what was divided in memory, and makes a product again.
        j = (codes - 1) * _RECIPROCAL >> 16
        signed = codes - 1 - _MU_LEVELS * j - _MU_LARGEST
        nu = jnp.where(codes == 0, 0, bits_of(top) - j * step)
        ratio = jnp.where(codes == 0, 0, signed).astype(jnp.float32) * scale
        return ratio * near_root(nu), float_of(nu)
