"""`Exact`: a moment as it is."""

from dataclasses import dataclass

import jax

from adamfn.formats.base import Stored


@dataclass(frozen=True)
class Exact:
    """Four bytes a parameter, nothing lost. In a pair, the format that others fall back to.

    >>> import jax.numpy as jnp
    >>> print(Exact().decode(Exact().encode(jnp.array([0.1]), None)))
    [0.1]
    """

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Stored:  # noqa: ARG002
        """Returns `x`."""
        return x

    def decode(self, stored: Stored) -> jax.Array:
        """Returns `stored`."""
        return stored

    def holds(self, shape: tuple[int, ...]) -> bool:  # noqa: ARG002
        """True."""
        return True
