"""`FourBit`: both moments in one byte, by blocks."""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from adamfn.formats.base import Stored, halves, threshold
from adamfn.formats.blocks import Extremes
from adamfn.formats.blockwise import Blockwise
from adamfn.formats.floats import SMALLEST_RATIO, bits_of, float_of, near_root, nearest
from adamfn.formats.levels import round_to_level, spanning
from adamfn.formats.quotients import quotient

_NU_LEVELS = 17
_MU_LEVELS = 15  # 17 * 15 and a zero are the 256 values of a byte
_MU_LARGEST = _MU_LEVELS // 2
_OCTAVES = 40
_RECIPROCAL = 2**16 // _MU_LEVELS + 1


class FourBitScales(NamedTuple):
    """What is kept of the blocks of a leaf of shape (..., n)."""

    scale: jax.Array
    """float32, (..., ceil(n / size)): what a level of 1 of mu is, over nu's root."""
    top: jax.Array
    """float32, likewise: the block's largest nu."""
    step: jax.Array
    """int32, likewise: from one level of nu to the next, in the bits of a float32."""


@dataclass(frozen=True)
class FourBit(Blockwise):
    r"""One byte a parameter, and 12 for each block of up to 128 along the last axis.

    The byte, uint8, stands in nu's place: 0 where nu is zero; else 1 + 15 j + (l + 7), for a level
    j of nu and a level l of mu.
    With T the bits of a block's largest nu and s its step, level j of nu and level l of mu are

    $$
    \nu = \text{float}(T - j s), \quad 0 \le j < 17; \qquad
    \mu = l \cdot \text{scale} \cdot r(\nu), \quad -7 \le l \le 7
    $$

    The 17 levels span the block's own range, but 40 octaves (6 decades of gradients) at most; what
    is below rounds up to the last. r(nu) is nu's root, up to 6 per cent. `encode` divides mu by
    the root of nu as it came, so that the ratio, nearly Adam's update, survives nu's rounding.

    nu is rounded stochastically, to the right *logarithm* on average: with levels an octave or two
    apart, an unbiased nu spends so much time too small that updates come out half as long again.
    Rounded to nearest, it would stand still. mu changes by far more than its rounding, and goes to
    the nearest.

    What is not finite stays visible: in nu as that element, perhaps with neighbours within a level
    of it; in mu as its whole block. Where nu is zero, mu is stored as zero, and where every mu of a
    block is below 2^-50 of nu's root.

    Attributes:
      block: the largest size of a block, a multiple of 16.

    References:
      Li, Chen and Zhu, Memory Efficient Optimizers with 4-bit States, 2023 (arXiv 2309.01507), for
      blocks of 128 and the harm of a nu that rounds to zero. The code is another.

    >>> import jax.numpy as jnp
    >>> gradients = jnp.array([1.0, -0.1, 0.01, 0.0])
    >>> mu, nu = FourBit().decode(FourBit().encode(0.5 * gradients, gradients**2, None))
    >>> print(mu.round(4))
    [ 0.5    -0.0519  0.0052  0.    ]
    >>> print(nu.round(5))
    [1.000e+00 1.031e-02 1.000e-04 0.000e+00]
    """

    block: int = 128

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """None for mu, uint8 for both in nu's place."""
        return None, jnp.uint8

    def encode_blocks(
        self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None, over: Extremes
    ) -> Stored:
        """Returns the codes of both in nu's place, and `FourBitScales`."""
        _, nu_bits = halves(noise)
        nu = bits_of(nu)

        levels = spanning(nu, _NU_LEVELS, over, _OCTAVES)
        j = round_to_level(nu, levels, _NU_LEVELS, threshold(nu_bits), unbiased=False)

        ratio = mu * jnp.where(nu == 0, 0, quotient(1.0, near_root(nu)))
        largest = float_of(over.largest(bits_of(ratio)))
        per_level = quotient(float(_MU_LARGEST), jnp.maximum(largest, SMALLEST_RATIO))
        # Divided anew: XLA would keep a quotient that is used twice in memory.
        ratio = mu * jnp.where(nu == 0, 0, quotient(per_level, near_root(nu)))
        codes = 1 + _MU_LEVELS * j + (nearest(ratio) + _MU_LARGEST)
        codes = jnp.where(nu == 0, 0, codes)
        scales = FourBitScales(largest * (1 / _MU_LARGEST), float_of(levels.top), levels.step)
        return Stored(None, codes, scales)

    def decode_blocks(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        """Returns both moments in float32."""
        _, codes, (scale, top, step) = cast("tuple[None, Any, FourBitScales]", stored)
        codes = codes.astype(jnp.int32)
        # A quotient by 15. XLA keeps what was divided in memory, and makes a product again.
        j = (codes - 1) * _RECIPROCAL >> 16
        signed = codes - 1 - _MU_LEVELS * j - _MU_LARGEST
        nu = jnp.where(codes == 0, 0, bits_of(top) - j * step)
        ratio = jnp.where(codes == 0, 0, signed).astype(jnp.float32) * scale
        return ratio * near_root(nu), float_of(nu)
