"""What a format is, and what else the library asks of one."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

MeshAxes = tuple[tuple[str, ...], ...]
"""For each axis of a leaf, the mesh axes that split it; empty for a whole leaf."""

SMALLEST = 4096  # leaves of fewer elements stay in float32: a thousandth of a model


class Stored(NamedTuple):
    """The moments of one leaf as a format stores them; at most one of `mu` and `nu` is None.

    Those two have the leaf's shape, and all other arrays are in `scales`: tools that know how a
    parameter is sharded expect everything under its path to be sharded likewise.
    """

    mu: Array | None
    nu: Array | None
    scales: Any = ()


class Format(Protocol):
    """How the two moments of one leaf are stored: two pure functions, inverse up to rounding.

    It is frozen and hashable, as compiled programs are cached by it. Stored zeros decode to zero,
    so a first state needs no `encode`. `BaseFormat` has more that a format can tell.
    """

    def encode(self, mu: Array, nu: Array, noise: Array | None) -> Stored:
        """Stores mu and nu >= 0, both float32 of the leaf's shape.

        `noise`, uint32 of that shape, is for stochastic rounding; None rounds to nearest.
        """
        ...

    def decode(self, stored: Stored) -> tuple[Array, Array]:
        """Returns both moments, float32 of the leaf's shape."""
        ...

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether it can store a leaf; if not, the leaf stays in float32."""
        ...


class BaseFormat:
    """What else the library asks a format, or a codec in a `Pair`, with the default answers.

    The defaults also hold for a class that does not derive from this one. An answer is about the
    `encode` and `decode` of its class: a subclass that overrides these has to answer again.

    Attributes:
      block: the largest block along the last axis, cut as by `Blockwise`; 0 for none. None if
        unknown: then a leaf on several devices is not encoded shard by shard.
      stores_rows: whether each row of the last axis is stored independently of the others.
      kernel_block: the largest block in a kernel; 0 if elementwise, None if no kernel has it.
      native_code: its number in the C++ code; None if that does not have it.
      factors: for scales that are a pair with means of nu as the second, a function of the means:
        it returns arrays that broadcast to the leaf and whose product is nu. None for others.
    """

    block: Any = None
    stores_rows: Any = False
    kernel_block: Any = None
    native_code: Any = None
    factors: Any = None

    def resized(self, block: int) -> Any:
        """The same with another largest block, if it has blocks."""
        return replace(self, block=block) if self.block else self  # pyright: ignore[reportArgumentType]

    def on_shards(self, split: MeshAxes) -> Any:
        """The same for a shard, in `jax.shard_map`, of a leaf split so; for a known `block`."""
        return self

    def in_tile(self, inside: Array | None, over: Any) -> Any:
        """The same for a kernel's tile of whole blocks, with their `Extremes`."""
        return InTile(self, inside, over) if self.kernel_block else self

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        """Where codes are at an end of their range: bool arrays lowest, highest, largest."""
        return {}


class InTile(NamedTuple):
    """A format for a tile of whole blocks. Elements outside the leaf count as zero."""

    format: Any
    inside: Array | None
    over: Any

    def encode(self, mu: Array, nu: Array, noise: Array | None) -> Stored:
        """Returns codes, and scales with 1 in place of a block."""
        if self.inside is not None:
            mu, nu = (jnp.where(self.inside, x, 0) for x in (mu, nu))
        return self.format.encode_blocks(mu, nu, noise, self.over)

    def decode(self, stored: Stored) -> tuple[Array, Array]:
        """Returns both moments."""
        return self.format.decode_blocks(stored)


_OF_FLOAT32 = {"block": 0, "stores_rows": True, "kernel_block": 0, "native_code": 0}


def answer(format: Any, name: str) -> Any:
    """An attribute or bound method of `BaseFormat`, for a format, a codec, or None for float32."""
    if format is None and name in _OF_FLOAT32:
        return _OF_FLOAT32[name]
    for owner in type(format).__mro__ if isinstance(format, BaseFormat) else ():
        if name in vars(owner):
            return getattr(format, name)
        methods = {"encode", "decode"} & vars(owner).keys()
        if any(hasattr(base, method) for base in owner.__bases__ for method in methods):
            break  # it overrides the encoding that the answer is about
    default = getattr(BaseFormat, name)
    return partial(default, format) if callable(default) else default


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is real and its moments are averaged in float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits <= 32


def is_large(shape: tuple[int, ...], last: int = 1) -> bool:
    """Whether a leaf has 4096 elements, and at least `last` along its last axis."""
    return len(shape) > 0 and math.prod(shape) >= SMALLEST and shape[-1] >= last
