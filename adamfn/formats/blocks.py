"""Blocks of elements along the last axis, and their largest and smallest."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def size_for(length: int, largest: int) -> int:
    """The block size for a last axis of this length.

    That is the multiple of 16, from `largest` down to its half, whose last block lacks least, and
    of several the largest. Most lengths are divided by one. Then nothing is padded, which XLA does
    on CPU by writing all of it to memory.

    >>> [size_for(length, 256) for length in (768, 640, 192, 300)]
    [256, 160, 192, 160]
    """
    return min(range(largest, largest // 2 - 1, -16), key=lambda size: -length % size)


def check_size(format: str, size: Any) -> None:
    """Checks the size of blocks that a user gave.

    Raises:
      ValueError: it is not a positive multiple of 16.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 16 or size % 16:
        raise ValueError(
            f"{format}: block is {size!r}; expected a positive multiple of 16, such as 128 or 256."
        )


def split(x: jax.Array, size: int) -> jax.Array:
    """Cuts the last axis into blocks: `(..., n)` to `(..., ceil(n / size), size)`.

    The last block is filled up with zeros for the computation; what is stored is cut by `join`.
    """
    length = x.shape[-1]
    if length % size:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % size)])
    return x.reshape(*x.shape[:-1], -1, size)


def join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `split` of an axis of that length."""
    return x.reshape(*x.shape[:-2], -1)[..., :length]


def spread(x: jax.Array, size: int, length: int) -> jax.Array:
    """What blocks have one of each, for each element of an axis of that length."""
    return join(jnp.broadcast_to(x, (*x.shape[:-1], size)), length)


class Extremes(NamedTuple):
    """The largest and the smallest of each block of bits of numbers not below zero.

    Both keep the axis that they run along, as 1. What computes them differs, and no bit of theirs.
    """

    largest: Callable[[jax.Array], jax.Array]
    smallest: Callable[[jax.Array], jax.Array]


def along(axis: int) -> Extremes:
    """Those of blocks that an axis of a kernel's tile spans."""
    return Extremes(
        partial(jnp.max, axis=axis, keepdims=True), partial(jnp.min, axis=axis, keepdims=True)
    )


def _in_two_stages(x: jax.Array, reduction: Callable[..., jax.Array]) -> jax.Array:
    # The first runs over whole vectors. On CPU, XLA would merge them and then cut the reduction
    # into windows, for which it writes all of x to memory: twice as slow. The maximum changes
    # nothing, and keeps them apart as a barrier would.
    x = x.reshape(*x.shape[:-1], -1, 16)
    return reduction(jnp.maximum(reduction(x, axis=-2), 0), axis=-1, keepdims=True)


BY_XLA = Extremes(
    partial(_in_two_stages, reduction=jnp.max), partial(_in_two_stages, reduction=jnp.min)
)
"""Those of blocks along the last axis, as XLA is quick to compute them."""
