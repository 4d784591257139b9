# SPDX-License-Identifier: Apache-2.0
"""What a format is, and what else the library asks of one."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from adamfn.trees import at_least, is_known

MeshAxes = tuple[tuple[str, ...], ...]
"""For each axis of a leaf, the mesh axes that split it; empty for a whole leaf."""


class Stored(NamedTuple):
    """The moments of one leaf as a format stores them; at most one of `mu` and `nu` is None.

    Those two have the leaf's shape, as tools shard everything under a parameter's path like it.
    All other arrays are in `scales`.
    """

    mu: Array | None
    nu: Array | None
    scales: Any = ()


class Format(Protocol):
    """How the two moments of one leaf are stored: two pure functions, inverse up to rounding.

    `encode` stores mu and nu >= 0, float32 of the leaf's shape, and `decode` returns them. Noise,
    uint32 of that shape, is for stochastic rounding; None rounds to nearest. Zeros decode to zero,
    so a first state needs no `encode`. Where `holds` is False, a leaf stays in float32. A format
    is frozen and hashable, as compiled programs are cached by it. `BaseFormat` has more to answer.
    """

    def encode(self, mu: Array, nu: Array, noise: Array | None) -> Stored: ...

    def decode(self, stored: Stored) -> tuple[Array, Array]: ...

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool: ...


class BaseFormat:
    """What else the library asks a format, or a codec in a `Pair`, with the default answers.

    The defaults also hold for a class that does not derive from this one. A subclass that
    overrides `encode` or `decode` has to answer again.

    Attributes:
      block: the largest block along the last axis, cut as by `Blockwise`; 0 for none. If None,
        unknown, a leaf on several devices is not encoded shard by shard.
      stores_rows: whether each row of the last axis is stored independently of the others.
      kernel_block: the largest block in a kernel; 0 if elementwise, None if no kernel has it.
      native_code: its number in the C++ code; None if that does not have it.
      largest: gradients beyond are clamped to it, as sums of their squares would overflow; None if
        it takes no sums.
      largest_b1: the largest b1 of moments that it may store.
      factors: None, or for scales of mu and means of nu, a function of these means that returns
        arrays whose product broadcasts to nu.
    """

    block: Any = None
    stores_rows: Any = False
    kernel_block: Any = None
    native_code: Any = None
    largest: Any = 2.0**48
    largest_b1: Any = 1.0
    factors: Any = None

    def resized(self, block: int) -> Any:
        """The same with another largest block, if it has blocks."""
        return replace(self, block=block) if self.block else self  # pyright: ignore[reportArgumentType]

    def on_shards(self, split: MeshAxes) -> Any:
        """The same for a shard, in `jax.shard_map`, of a leaf split so; for a known `block`."""
        return self

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        """Where codes are at an end of their range: bool arrays lowest, highest, largest."""
        return {}


class Elementwise(BaseFormat):
    """The answers of float32, and of codecs that store each element by itself."""

    block = kernel_block = native_code = 0
    stores_rows = True
    largest = None


class InTile(NamedTuple):
    """A format with blocks for a kernel's tile of them. Elements outside the leaf count as 0."""

    format: Any
    inside: Array | None
    largest: Any

    def encode(self, mu: Array, nu: Array, noise: Array | None) -> Stored:
        if self.inside is not None:
            mu, nu = (jnp.where(self.inside, x, 0) for x in (mu, nu))
        return self.format.encode_blocks(mu, nu, noise, self.largest)

    def decode(self, stored: Stored) -> tuple[Array, Array]:
        return self.format.decode_blocks(stored)


def answer(format: Any, name: str) -> Any:
    """An attribute or bound method of `BaseFormat`, for a format, a codec, or None for float32."""
    format = format.format if isinstance(format, InTile) else format
    format = Elementwise() if format is None else format
    for owner in type(format).__mro__ if isinstance(format, BaseFormat) else ():
        if name in vars(owner):
            return getattr(format, name)
        methods = {"encode", "decode"} & vars(owner).keys()
        if any(hasattr(base, method) for base in owner.__bases__ for method in methods):
            break  # an answer from before the override may be wrong
    default = getattr(BaseFormat, name)
    return partial(default, format) if callable(default) else default


def has_hash(value: Any) -> bool:
    """Whether compiled programs can be cached by a format or a formula."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is real and its moments are averaged in float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits <= 32


def is_large(shape: tuple[int, ...], last: int = 1) -> bool:
    """Whether a leaf has 4096 elements, and `last` along its last axis; others stay in float32."""
    if not at_least(math.prod(shape), 4096):
        return False
    return last == 1 or (is_known(shape[-1]) and shape[-1] >= last)  # blocks of known sizes
