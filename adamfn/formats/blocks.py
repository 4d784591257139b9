# SPDX-License-Identifier: Apache-2.0
"""Blocks of elements along the last axis, and `Blockwise`, the base of formats that use them."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.formats.format import BaseFormat, Stored, is_large, is_narrow
from adamfn.trees import exported, shown


def size_for(length: int, largest: int) -> int:
    """The block size for a last axis of this length.

    The largest multiple of 16, from `largest` down to its half, that needs the least padding: to
    pad, XLA on CPU writes the whole array to memory.

    >>> [size_for(length, 256) for length in (768, 640, 192, 300)]
    [256, 160, 192, 160]
    """
    return min(range(largest, largest // 2 - 1, -16), key=lambda size: -length % size)


def cut_block(block: int, shape: Sequence[int], parts: int) -> int | None:
    """The block size of a leaf if so many parts of its last axis would cut a block; else None."""
    if block == 0 or parts == 1:
        return None
    size = size_for(shape[-1], block)
    return size if shape[-1] % parts or shape[-1] // parts % size else None


def split(x: Array, size: int) -> Array:
    """Cuts the last axis into blocks: `(..., n)` to `(..., ceil(n / size), size)`, with zeros."""
    if missing := -x.shape[-1] % size:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, size)


def join(x: Array, length: int) -> Array:
    """Undoes `split` of an axis of that length."""
    return x.reshape(*x.shape[:-2], -1)[..., :length]


Largest: TypeAlias = Callable[[Array], Array]
"""A function from integers at least 0 to the largest of each block; its axis is kept as 1."""


def along(axis: int) -> Largest:
    """The largest of blocks that each span an axis of a kernel's tile."""
    return partial(jnp.max, axis=axis, keepdims=True)


def along_last(x: Array) -> Array:
    """The largest of blocks along the last axis, as XLA computes it fast."""
    # The first maximum runs over whole vectors. The second changes nothing, and keeps the others
    # apart: XLA on CPU would merge them, and write all of x to memory, which is twice as slow.
    x = x.reshape(*x.shape[:-1], -1, 16)
    return jnp.max(jnp.maximum(jnp.max(x, axis=-2), 0), axis=-1, keepdims=True)


@exported
class BlockScales(NamedTuple):
    """Scales of the blocks of a leaf of (..., n), each of (..., ceil(n / size))."""

    scale: Array  # float32: mu over nu's root for a code of 1
    top: Array  # float32: the largest nu
    step: Array  # int32: the distance of nu's levels in the bits of a float32


@dataclass(frozen=True)
class InBlocks(BaseFormat):
    """The answers of formats and codecs that store each block independently."""

    block: int = 256
    stores_rows = True
    largest = None
    kernel_block = property(lambda self: self.block)

    def __post_init__(self) -> None:
        size: Any = self.block
        if not isinstance(size, int) or isinstance(size, bool) or size < 16 or size % 16:
            raise ValueError(
                f"{type(self).__name__}: block is {shown(size)}; expected a positive multiple of"
                " 16, such as 128 or 256."
            )

    def split(self, tree: Any) -> Any:
        """Each array of a tree, with its last axis cut into blocks."""
        return jax.tree.map(lambda x: split(x, size_for(x.shape[-1], self.block)), tree)


class Blockwise(InBlocks, abc.ABC):
    """A base class for formats that store each block of the last axis independently.

    A subclass writes the arithmetic of whole blocks once: XLA applies it to `(..., blocks, size)`,
    and kernels to tiles of a leaf, where blocks may lie along any axis. It holds real leaves of at
    most 32 bits, with 4096 elements and half a block in a row.

    Attributes:
      block: the largest size of a block, a multiple of 16.
      dtypes: of the class: the dtypes of mu's and nu's codes, or None.
    """

    dtypes: ClassVar[Any]

    @abc.abstractmethod
    def encode_blocks(self, mu: Array, nu: Array, noise: Array | None, largest: Largest) -> Stored:
        """Stores whole blocks: codes of any dtype, and scales with 1 in place of a block.

        It is elementwise but for `largest`, the largest of each block of integers at least 0.
        """

    @abc.abstractmethod
    def decode_blocks(self, stored: Stored) -> tuple[Array, Array]:
        """The inverse of `encode_blocks`."""

    def encode(self, mu: Array, nu: Array, noise: Array | None) -> Stored:
        length, (mu, nu, noise) = mu.shape[-1], self.split((mu, nu, noise))
        *codes, scales = self.encode_blocks(mu, nu, noise, along_last)
        mu, nu = jax.tree.map(lambda x, dtype: join(x.astype(dtype), length), codes, [*self.dtypes])
        return Stored(mu, nu, jax.tree.map(lambda scale: scale[..., 0], scales))

    def decode(self, stored: Stored) -> tuple[Array, Array]:
        scales = jax.tree.map(lambda scale: scale[..., None], stored.scales)
        mu, nu = self.split(stored[:2])
        mu, nu = self.decode_blocks(Stored(mu, nu, scales))
        length = jax.tree.leaves(stored[:2])[0].shape[-1]
        return join(mu, length), join(nu, length)

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        return is_narrow(dtype) and is_large(shape, last=self.block // 2)
