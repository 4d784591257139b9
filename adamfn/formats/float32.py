"""`Exact`: a moment as it is."""

from dataclasses import dataclass
from typing import Any

import jax

from adamfn.formats.codec import Encoded


@dataclass(frozen=True)
class Exact:
    """Four bytes a parameter, nothing lost. In a pair, the format that others fall back to.

    >>> import jax.numpy as jnp
    >>> print(Exact().decode(*Exact().encode(jnp.array([0.1]), None)))
    [0.1]
    """

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Encoded:
        """Returns `x`."""
        return Encoded(x)

    def decode(self, codes: jax.Array, scales: Any) -> jax.Array:
        """Returns `codes`."""
        return codes

    def holds(self, shape: tuple[int, ...]) -> bool:
        """True."""
        return True
