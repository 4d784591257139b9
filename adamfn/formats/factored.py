"""`Factored`: nu as the means of its rows and columns."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.formats.codec import Encoded
from adamfn.formats.means import MeshAxes, mean_over, whole_shape

_SMALLEST_AXIS = 128


class Factors(NamedTuple):
    """The means of a leaf over each of two axes; both keep all axes, those two as 1."""

    rows: jax.Array
    """float32: means over the second of the two axes."""
    columns: jax.Array
    """float32: means over the first."""


@dataclass(frozen=True)
class Factored:
    r"""nu as an outer product: 4 bytes a row and a column, almost none a parameter.

    Over the two longest axes of a leaf (of equal ones the last), with R and C the means:

    $$ \nu_{ij} \approx R_i C_j / \overline{R} $$

    Rows and columns keep their means exactly, so averaging over time what was decoded is averaging
    R and C, as Adafactor does. Deterministic: the noise is not used.

    Infinities and NaN spread over their row and column, and from R's mean over the whole matrix.

    Attributes:
      split: inside `jax.shard_map`, for each axis of a leaf the mesh axes that split it.

    References:
      Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
      algorithm 2 (arXiv 1804.04235).

    >>> import jax.numpy as jnp
    >>> nu = jnp.arange(1.0, 129.0)[:, None] * jnp.arange(1.0, 257.0)
    >>> factors = Factored().encode(nu, None)
    >>> print(factors.scales.rows.shape, factors.scales.columns.shape)
    (128, 1) (1, 256)
    >>> print(jnp.abs(Factored().decode(*factors) / nu - 1).max() < 1e-6)
    True
    """

    split: MeshAxes = field(default=(), repr=False)

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Encoded:
        """Returns no codes, and `Factors`."""
        first, second = _two_longest(whole_shape(x.shape, self.split))
        rows, columns = (mean_over(x, axis, self.split) for axis in (second, first))
        return Encoded(None, Factors(rows, columns))

    def decode(self, codes: None, scales: Any) -> jax.Array:
        """Returns it in float32."""
        rows, columns = self.factors(scales)
        return rows * columns

    def factors(self, scales: Any) -> tuple[jax.Array, ...]:
        """What `decode` multiplies, with an axis of 1 where all elements share a factor."""
        rows, columns = scales
        shape = tuple(map(max, rows.shape, columns.shape))
        first, _ = _two_longest(whole_shape(shape, self.split))
        mean = mean_over(rows, first, self.split)
        # The quotient first: the product of two small means would underflow.
        return jnp.where(mean == 0, 0, rows / jnp.where(mean == 0, 1, mean)), columns

    def holds(self, shape: tuple[int, ...]) -> bool:
        """True if two axes have 128 elements and more."""
        return sum(n >= _SMALLEST_AXIS for n in shape) >= 2


def _two_longest(shape: tuple[int, ...]) -> tuple[int, int]:
    first, second = sorted(sorted(range(len(shape)), key=lambda axis: (shape[axis], axis))[-2:])
    return first, second
