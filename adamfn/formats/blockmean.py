"""`BlockMean`: one nu for a whole row."""

from dataclasses import dataclass, field
from typing import Any

import jax

from adamfn.formats.base import is_large
from adamfn.formats.codec import Encoded
from adamfn.formats.means import MeshAxes, mean_over


@dataclass(frozen=True)
class BlockMean:
    r"""One nu for all elements along an axis: their mean.

    $$ \nu_{i\cdot} \approx \frac{1}{n} \sum_j \nu_{ij} $$

    Adam-mini shares nu within a unit's weights. Along the last axis, the default, that is a token's
    row of an embedding, and of a kernel of (inputs, outputs) the weights that leave one input; for
    those that enter one output, use `axis=-2`. Deterministic: the noise is not used.

    Infinities and NaN become those of all that share their mean.

    Attributes:
      axis: the axis to average over.
      split: inside `jax.shard_map`, for each axis of a leaf the mesh axes that split it.

    References:
      Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, 2024 (arXiv 2406.16793).

    >>> import jax.numpy as jnp
    >>> print(BlockMean().encode(jnp.array([[1.0, 3.0], [5.0, 7.0]]), None).scales)
    [[2.]
     [6.]]
    """

    axis: int = -1
    split: MeshAxes = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Checks the axis."""
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"BlockMean: axis is {self.axis!r}; expected an integer, such as -1.")

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Encoded:
        """Returns no codes, and the means: float32 of x's shape, but 1 along the axis."""
        return Encoded(None, mean_over(x, self.axis, self.split))

    def decode(self, codes: None, scales: Any) -> jax.Array:
        """Returns the means, which broadcast to the leaf's shape."""
        return scales

    def factors(self, scales: Any) -> tuple[jax.Array, ...]:
        """The means: `Factored` has two such."""
        return (scales,)

    def holds(self, shape: tuple[int, ...]) -> bool:
        """True for 4096 elements and more in at least two axes, the averaged one among them."""
        has_axis = -len(shape) <= self.axis < len(shape)
        return has_axis and len(shape) >= 2 and is_large(shape, last=1)
