"""`Pair`: a format made of one codec for mu and another for nu."""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from adamfn.formats.base import Stored, halves, is_narrow
from adamfn.formats.blockmean import BlockMean
from adamfn.formats.factored import Factored


class Codec(Protocol):
    """How one moment of one leaf is stored, whatever the other is. Frozen and hashable."""

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Stored:
        """Stores a moment.

        Args:
          x: float32.
          bits: int32 of its shape, 16 random bits each; None rounds to nearest.
        """
        ...

    def decode(self, stored: Stored) -> jax.Array:
        """Returns float32 of the leaf's shape, or for nu one that broadcasts to it."""
        ...

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether it stores leaves of this shape."""
        ...


def is_codec(value: Any) -> bool:
    """Whether something is a `Codec`: its `holds` takes a shape alone, a format's a dtype too."""
    methods = [getattr(value, name, None) for name in ("encode", "decode", "holds")]
    if isinstance(value, type) or not all(map(callable, methods)):
        return False
    return len(inspect.signature(value.holds).parameters) == 1


@dataclass(frozen=True)
class Pair:
    """Stores mu by one codec and nu by another.

    Attributes:
      mu: `Exact`, `Rounded` or `Linear`: a codec that keeps every element.
      nu: any codec.

    Raises:
      TypeError: one of them is no codec.
      ValueError: mu's keeps means alone.

    >>> import jax.numpy as jnp
    >>> from adamfn.formats import Exact, Factored, Pair
    >>> format = Pair(mu=Exact(), nu=Factored())
    >>> mu, nu = format.decode(*format.encode(jnp.ones((128, 128)), jnp.ones((128, 128)), None))
    >>> print(nu.shape, nu.min(), nu.max())
    (128, 128) 1.0 1.0
    """

    mu: Codec
    nu: Codec

    def __post_init__(self) -> None:
        """Checks the codecs."""
        for moment, codec in (("mu", self.mu), ("nu", self.nu)):
            if not is_codec(codec):
                raise TypeError(
                    f"Pair: {moment} is {codec!r}; expected a codec of one moment: Exact(),"
                    " Rounded(), Linear(), Factored(), BlockMean() or an object like them."
                )
        if isinstance(self.mu, Factored | BlockMean):
            raise ValueError(
                f"Pair: mu is {self.mu!r}, which keeps means alone; expected a codec that keeps"
                " every element, such as Linear()."
            )

    def encode(
        self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None
    ) -> tuple[Stored, Stored]:
        """Returns what the two codecs make of their moments."""
        mu_bits, nu_bits = halves(noise)
        return self.mu.encode(mu, mu_bits), self.nu.encode(nu, nu_bits)

    def decode(self, stored_mu: Stored, stored_nu: Stored) -> tuple[jax.Array, jax.Array]:
        """Returns both moments in float32."""
        mu = self.mu.decode(stored_mu)
        return mu, jnp.broadcast_to(self.nu.decode(stored_nu), mu.shape)

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """True for real leaves of at most 32 bits, of a shape that both codecs hold."""
        return is_narrow(dtype) and self.mu.holds(shape) and self.nu.holds(shape)
