"""`Rounded`: a moment in bfloat16, rounded stochastically."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.formats.base import is_large
from adamfn.formats.codec import Encoded
from adamfn.formats.floats import INFINITY, float_of


@dataclass(frozen=True)
class Rounded:
    """Two bytes a parameter: bfloat16, which has float32's range and the upper half of its bits.

    Adding 16 random bits and dropping the lower half carries into the upper with probability
    (lower half) / 2^16: no bias, and no comparison. To nearest, nu would stop: with b2 = 0.999 a
    step moves it by a thousandth, and bfloat16 numbers lie 0.4 to 0.8 per cent apart.

    Infinities and NaN stay what they are.

    Attributes:
      stochastic: False rounds to nearest whatever the bits.

    >>> import jax.numpy as jnp
    >>> x = jnp.full(2, 1 + 2**-9)  # a quarter of the way to the next
    >>> print(Rounded().encode(x, jnp.array([0xBFFF, 0xC000])).codes)
    [1 1.00781]
    """

    stochastic: bool = True

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Encoded:
        """Returns bfloat16 of x's shape."""
        if bits is None or not self.stochastic:
            return Encoded(x.astype(jnp.bfloat16))
        word = jax.lax.bitcast_convert_type(x, jnp.int32)
        # In float32, which holds the upper half as it is: halves of words cost a TPU a copy.
        rounded = float_of((word + bits) & ~0xFFFF)
        finite = (word & INFINITY) != INFINITY
        return Encoded(jnp.where(finite, rounded, x).astype(jnp.bfloat16))

    def decode(self, codes: jax.Array, scales: Any) -> jax.Array:
        """Returns it in float32."""
        return codes.astype(jnp.float32)

    def holds(self, shape: tuple[int, ...]) -> bool:
        """True for 4096 elements and more."""
        return is_large(shape, last=1)
