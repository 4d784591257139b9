"""What a format is, and the noise that the formats round with."""

import math
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from adamfn.formats.elements import numbers_of
from adamfn.formats.floats import float_of

SMALLEST = 4096
"""Leaves of fewer elements stay in float32: all together they are a thousandth of a model."""


class Stored(NamedTuple):
    """What a format keeps of the two moments of one leaf.

    What has the leaf's shape stands apart from what has not, because tools that know how a
    parameter is sharded take everything under its path to be sharded likewise.
    """

    mu: jax.Array | None
    """An array of the leaf's shape, or None: the average of the gradients."""
    nu: jax.Array | None
    """Likewise: the average of their squares. One of the two is an array."""
    scales: Any = ()
    """A tree of arrays of other shapes: what decoding needs besides."""


class Format(Protocol):
    """How the two moments of one leaf are stored: two pure functions, inverse up to rounding.

    A format is frozen and hashable, so it can be a static argument of a jitted function. Stored
    arrays that hold only zeros decode to zero, so a first state needs no `encode`.
    """

    def encode(self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None) -> Stored:
        """Stores the moments of a leaf.

        Args:
          mu: the average of the gradients, float32.
          nu: the average of their squares, float32 of the same shape, not negative.
          noise: uint32 of the same shape, from `noise`, for formats that round stochastically;
            None rounds to nearest.

        Returns:
          What `decode` takes.
        """
        ...

    def decode(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        """Returns both moments, float32 of the leaf's shape."""
        ...

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether it stores leaves like this one; others are to stay in float32."""
        ...


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is real and its moments are averaged in float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits <= 32


def is_large(shape: tuple[int, ...], last: int) -> bool:
    """Whether a leaf has 4096 elements and `last` along its last axis, so that storing it pays."""
    return len(shape) > 0 and math.prod(shape) >= SMALLEST and shape[-1] >= last


def noise(count: chex.Numeric, leaf: chex.Numeric, shape: tuple[int, ...]) -> jax.Array:
    """One random 32-bit word for each element of a leaf: 16 bits for each moment.

    A hash of (count, leaf, element number). It needs no state, it is the same however the leaf is
    sharded, and a compiler makes it where it is used. Both rounds are Wellons's lowbias32, with
    one key added before the first and another xored in before the second: were there only the
    first, any two steps would see one sequence shifted.

    Args:
      count: the step, an integer or an integer scalar array.
      leaf: the leaf's number, likewise.
      shape: the leaf's shape. Element numbers count modulo 2^32.

    Returns:
      uint32 of that shape.

    References:
      Wellons, Prospecting for Hash Functions, 2018, nullprogram.com/blog/2018/07/31.

    >>> print(noise(1, 0, (3,)) == noise(1, 0, (3,)), noise(1, 0, (3,)) == noise(2, 0, (3,)))
    [ True  True  True] [False False False]
    """
    return noise_at(seed_of(count, leaf), numbers_of(shape))


class Seed(NamedTuple):
    """The two keys, uint32, of the noise of a leaf at a step."""

    first: jax.Array
    second: jax.Array


def seed_of(count: chex.Numeric, leaf: chex.Numeric) -> Seed:
    """The `Seed` of `noise`."""
    zero = jnp.zeros((), jnp.uint32)
    leaf = _hash(jnp.asarray(leaf).astype(jnp.uint32) + jnp.uint32(0x9E3779B9), zero)
    first = _hash(jnp.asarray(count).astype(jnp.uint32), leaf)
    return Seed(first, _hash(first + jnp.uint32(0x85EBCA6B), leaf))


def noise_at(seed: Seed, elements: jax.Array) -> jax.Array:
    """`noise` of some elements of a leaf, by their numbers: uint32, as what it returns."""
    return _hash(seed.first + elements, seed.second)


def _hash(x: jax.Array, key: jax.Array) -> jax.Array:
    x = (x ^ x >> 16) * jnp.uint32(0x7FEB352D)
    x = (x ^ x >> 15 ^ key) * jnp.uint32(0x846CA68B)
    return x ^ x >> 16


def halves(noise: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
    """The 16 random bits that round mu and the 16 that round nu, int32; None of None."""
    if noise is None:
        return None, None
    return (noise & 0xFFFF).astype(jnp.int32), (noise >> 16).astype(jnp.int32)


def threshold(bits: jax.Array | None) -> jax.Array | float:
    """Sixteen random bits as a number in (0, 1): what a fraction must exceed to be rounded up.

    It is the middle of its interval of 2^-16, so probabilities are right to 2^-17. None gives 1/2.
    """
    return 0.5 if bits is None else _beyond_one(bits) - 1


def dither(bits: jax.Array | None) -> jax.Array | float:
    """`threshold` less 1/2: what is added to a number before it is rounded to the nearest."""
    return 0.0 if bits is None else _beyond_one(bits) - 1.5


def _beyond_one(bits: jax.Array) -> jax.Array:
    # As the mantissa of a number from 1 to 2: conversions cost a GPU much.
    return float_of(bits << 7 | 0x3F800040)
