"""`EightBit`: nu in logarithmic levels, mu in even levels of its ratio to nu's root, by blocks."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array

from adamfn.formats import bits
from adamfn.formats.bits import bits_of, float_of, near_root, quotient
from adamfn.formats.blocks import BlockScales, Blockwise, Extremes
from adamfn.formats.format import Stored
from adamfn.formats.noise import dither, halves, threshold

_LEVELS = 255


@dataclass(frozen=True)
class EightBit(Blockwise):
    r"""Two bytes a parameter, and 12 for each block of up to 256 along the last axis.

    mu's codes are int8, -127 to 127; nu's are uint8, 0 for zero and 1 to 255 for the levels,
    upwards. With T the bits of a block's largest nu and s its step, a nu code k and a mu code l
    decode to

    $$
    \nu = \text{float}(T - (255 - k)\, s), \qquad \mu = l \cdot \text{scale} \cdot r(\nu)
    $$

    and k = 0 to zero. The levels span the block's range, from its smallest nonzero nu to its
    largest; r(nu) is nu's root, up to 6 per cent. That ratio of moments is nearly Adam's update, so
    mu keeps as many digits where gradients are small as where they are large. Rounding is
    stochastic and unbiased: nu's, and mu's given nu's level.

    Infinity and NaN stay visible: in nu as that element (a NaN makes the block's infinities NaN
    too), in mu as its whole block. Where nu is zero, mu is stored as zero: the update there would
    have no bound. A nonzero nu stays nonzero; the smallest that is told apart is 2^-126. Where
    every mu of a block is below 2^-50 of nu's root, and moves nothing, they fade to zero.

    Attributes:
      block: the largest size of a block, a multiple of 16.

    References:
      Dettmers, Lewis, Shleifer and Zettlemoyer, 8-bit Optimizers via Block-wise Quantization, 2022
      (arXiv 2110.02861), for the blocks. The levels are ours, and need no table.

    >>> import jax.numpy as jnp
    >>> gradients = jnp.array([1.0, -0.1, 0.01, 0.0])
    >>> stored = EightBit().encode(0.5 * gradients, gradients**2, None)
    >>> print(stored.nu, EightBit().decode(stored)[0].round(2))
    [255 127   1   0] [ 0.5  -0.05  0.    0.  ]
    """

    dtypes = jnp.int8, jnp.uint8
    # A subclass may differ.
    native_code = property(
        lambda self: 3 if type(self) is EightBit and self.block <= 1024 else None
    )

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        """Where codes are at an end of their range."""
        return {"lowest": nu == 1, "highest": nu == 255, "largest": jnp.abs(mu) == 127}

    def encode_blocks(self, mu: Array, nu: Array, noise: Array | None, over: Extremes) -> Stored:
        """Returns codes for both, and `BlockScales`."""
        mu_bits, nu_bits = halves(noise)
        nu = bits_of(nu)
        levels = bits.spanning(nu, _LEVELS, over)
        j = bits.round_to_level(nu, levels, _LEVELS, threshold(nu_bits), unbiased=True)
        codes = jnp.where(nu == 0, 0, _LEVELS - j)

        # The scale is for nu as given, lest a second pass wait for the levels chosen. A level
        # below has a root smaller by this factor at most, with room for roundings.
        fall = 1 + 2.0**-20 + levels.step.astype(jnp.float32) * 2.0**-24
        ratio = mu * jnp.where(nu == 0, 0, quotient(1.0, near_root(nu)))
        largest = fall * float_of(over.largest(bits_of(ratio)))
        # A smaller ratio is no update. With it, the quotients below could be infinite.
        per_code = quotient(127.0, jnp.maximum(largest, bits.SMALLEST_RATIO))
        chosen = levels.top - j * levels.step
        ratio = mu * jnp.where(nu == 0, 0, quotient(per_code, near_root(chosen)))
        signed = bits.nearest(ratio + dither(mu_bits))
        scales = BlockScales(largest * (1 / 127), float_of(levels.top), levels.step)
        return Stored(signed, codes, scales)

    def decode_blocks(self, stored: Any) -> tuple[Array, Array]:
        """Returns both moments in float32."""
        mu_codes, nu_codes, (scale, top, step) = stored
        codes = nu_codes.astype(jnp.int32)
        nu = jnp.where(codes == 0, 0, bits_of(top) - _LEVELS * step + codes * step)
        return mu_codes.astype(jnp.float32) * scale * near_root(nu), float_of(nu)
