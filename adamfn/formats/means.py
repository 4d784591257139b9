# SPDX-License-Identifier: Apache-2.0
"""Codecs that store only means of nu: over rows and columns, or over one axis.

They are deterministic. Infinities and NaN spread over all elements that share a mean. Inside
`jax.shard_map`, `split` names for each axis of a leaf the mesh axes that split it.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.formats.codecs import Encoded
from adamfn.formats.format import BaseFormat, MeshAxes, is_large
from adamfn.trees import exported, is_known, shown


class _Means(BaseFormat):
    """The answers of a codec of means, which has a field `split`."""

    block = 0

    def on_shards(self, split: MeshAxes) -> Any:
        return replace(self, split=split)  # pyright: ignore[reportArgumentType]

    def decode(self, codes: None, scales: Any) -> Array:
        nu: Any = math.prod(self.factors(scales))
        return nu


@exported
class Factors(NamedTuple):
    """float32 means of a leaf over the second and the first of two axes, which are kept as 1."""

    rows: Array
    columns: Array


@dataclass(frozen=True)
class Factored(_Means):
    r"""nu as an outer product: 4 bytes a row and a column, almost none a parameter.

    Over the two longest axes of a leaf (of equal ones the last), with R and C the means:

    $$ \nu_{ij} \approx R_i C_j / \overline{R} $$

    Decoded rows and columns have exactly these means, so averaging decoded nu over time is
    averaging R and C, as Adafactor does (Shazeer and Stern, 2018, algorithm 2, arXiv 1804.04235).
    Infinities and NaN spread over the whole matrix, from R's mean. It holds leaves with 128
    elements and more along two axes.

    >>> import jax.numpy as jnp
    >>> nu = jnp.arange(1.0, 129.0)[:, None] * jnp.arange(1.0, 257.0)
    >>> factors = Factored().encode(nu, None)
    >>> print(jnp.abs(Factored().decode(*factors) / nu - 1).max() < 1e-6)
    True
    """

    split: MeshAxes = field(default=(), repr=False)

    def encode(self, x: Array, bits: Array | None) -> Encoded:
        first, second = _two_longest(x.shape, self.split)
        rows, columns = (_mean(x, axis, self.split) for axis in (second, first))
        return Encoded(None, Factors(rows, columns))

    def factors(self, means: Any) -> tuple[Array, ...]:
        """R over its mean, and C."""
        rows, columns = means
        first, _ = _two_longest(tuple(map(max, rows.shape, columns.shape)), self.split)
        mean = _mean(rows, first, self.split)
        # The quotient first: the product of two small means would underflow.
        return jnp.where(mean == 0, 0, rows / jnp.where(mean == 0, 1, mean)), columns

    def holds(self, shape: tuple[int, ...]) -> bool:
        return all(map(is_known, shape)) and sum(n >= 128 for n in shape) >= 2


@dataclass(frozen=True)
class BlockMean(_Means):
    r"""One nu for all elements along an axis: their mean.

    $$ \nu_{i\cdot} \approx \frac{1}{n} \sum_j \nu_{ij} $$

    Along the last axis, the default, these are a token's row of an embedding, and of a kernel of
    (inputs, outputs) the weights that leave one input; for those that enter one output, use
    `axis=-2`. Adam-mini (Zhang et al., 2024, arXiv 2406.16793) shares nu so. It holds leaves of
    4096 elements and more in at least two axes, the averaged one among them.

    >>> import jax.numpy as jnp
    >>> print(BlockMean().encode(jnp.array([[1.0, 3.0], [5.0, 7.0]]), None).scales.ravel())
    [2. 6.]
    """

    axis: int = -1
    split: MeshAxes = field(default=(), repr=False)
    stores_rows = property(lambda self: self.axis == -1 and not any(self.split[-1:]))

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"BlockMean: axis is {shown(self.axis)}; expected an integer, such as -1."
            )

    def encode(self, x: Array, bits: Array | None) -> Encoded:
        return Encoded(None, _mean(x, self.axis, self.split))

    def factors(self, means: Any) -> tuple[Array, ...]:
        """The means themselves."""
        return (means,)

    def holds(self, shape: tuple[int, ...]) -> bool:
        return len(shape) >= 2 and -len(shape) <= self.axis < len(shape) and is_large(shape)


@dataclass(frozen=True, eq=False)
class KnownFactors(BaseFormat):
    """Factors of nu in place of their means, for a part of a leaf: the next ones are known."""

    known: tuple[Array, ...]
    factors = staticmethod(tuple[Array, ...])

    def encode(self, x: Array, bits: Array | None) -> Encoded:
        return Encoded(None, self.known)

    def decode(self, codes: None, scales: Any) -> Array:
        nu: Any = math.prod(scales)
        return nu

    def holds(self, shape: tuple[int, ...]) -> bool:
        return True


def _mean(x: Array, axis: int, split: MeshAxes) -> Array:
    """The mean over an axis of the whole leaf, which is kept as 1."""
    mean = x.mean(axis, keepdims=True)
    names = split[axis] if split else ()
    return jax.lax.pmean(mean, names) if names else mean


def _two_longest(shape: tuple[int, ...], split: MeshAxes) -> tuple[int, int]:
    """The two longest axes of the whole leaf, from a shard's shape."""
    parts = [int(jax.lax.psum(1, names)) if names else 1 for names in split] or [1] * len(shape)
    lengths = [(n * part, axis) for axis, (n, part) in enumerate(zip(shape, parts, strict=True))]
    first, second = sorted(axis for _, axis in sorted(lengths)[-2:])
    return first, second
