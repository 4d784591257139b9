"""`Pair`: a format made of one codec for mu and another for nu."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.formats.base import Stored, halves, is_narrow
from adamfn.formats.blockmean import BlockMean
from adamfn.formats.codec import Codec, is_codec
from adamfn.formats.factored import Factored


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
    >>> mu, nu = format.decode(format.encode(jnp.ones((128, 128)), jnp.ones((128, 128)), None))
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

    def encode(self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None) -> Stored:
        """Returns what the two codecs make of their moments; the scales are a pair."""
        mu_bits, nu_bits = halves(noise)
        (mu_codes, mu_scales) = self.mu.encode(mu, mu_bits)
        (nu_codes, nu_scales) = self.nu.encode(nu, nu_bits)
        return Stored(mu_codes, nu_codes, (mu_scales, nu_scales))

    def decode(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        """Returns both moments in float32."""
        mu_scales, nu_scales = stored.scales
        mu = self.mu.decode(stored.mu, mu_scales)
        return mu, jnp.broadcast_to(self.nu.decode(stored.nu, nu_scales), mu.shape)

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """True for real leaves of at most 32 bits, of a shape that both codecs hold."""
        return is_narrow(dtype) and self.mu.holds(shape) and self.nu.holds(shape)
