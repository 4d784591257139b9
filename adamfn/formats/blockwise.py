"""`Blockwise`: what formats that store by blocks have in common."""

import abc
from dataclasses import dataclass
from typing import Any

import jax

from adamfn.formats import blocks
from adamfn.formats.base import Stored, is_large, is_narrow
from adamfn.formats.blocks import Extremes


@dataclass(frozen=True)
class Blockwise(abc.ABC):
    """A format that stores each block of up to `block` elements along the last axis by itself.

    Its arithmetic is that of whole blocks, and written once: XLA applies it to an array
    `(..., blocks, size)`, and kernels to tiles of a leaf, in which blocks may lie along any axis.

    Attributes:
      block: the largest size of a block, a multiple of 16.
    """

    block: int = 256

    def __post_init__(self) -> None:
        """Checks the block size."""
        blocks.check_size(type(self).__name__, self.block)

    @abc.abstractmethod
    def encode_blocks(
        self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None, over: Extremes
    ) -> Stored:
        """Stores whole blocks.

        Args:
          mu: the average of the gradients, float32.
          nu: the average of their squares, likewise.
          noise: as for `encode`.
          over: the extremes of blocks; other operations are elementwise.

        Returns:
          Codes, of any dtype that holds them, and scales with 1 where a block was.
        """

    @abc.abstractmethod
    def decode_blocks(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        """The inverse of `encode_blocks`."""

    @property
    @abc.abstractmethod
    def dtypes(self) -> tuple[Any, Any]:
        """The dtypes of the codes in mu's place and in nu's; None where there are none."""

    def encode(self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None) -> Stored:
        """Returns codes of the leaf's shape, and scales of `(..., ceil(n / size))`."""
        length = mu.shape[-1]
        size = blocks.size_for(length, self.block)
        words = None if noise is None else blocks.split(noise, size)
        stored = self.encode_blocks(
            blocks.split(mu, size), blocks.split(nu, size), words, blocks.BY_XLA
        )
        codes = [
            None if x is None else blocks.join(x.astype(dtype), length)
            for x, dtype in zip(stored[:2], self.dtypes, strict=True)
        ]
        return Stored(codes[0], codes[1], jax.tree.map(lambda scale: scale[..., 0], stored.scales))

    def decode(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        """Returns both moments in float32."""
        length = next(x.shape[-1] for x in stored[:2] if x is not None)
        size = blocks.size_for(length, self.block)
        mu, nu = (None if x is None else blocks.split(x, size) for x in stored[:2])
        scales = jax.tree.map(lambda scale: scale[..., None], stored.scales)
        mu, nu = self.decode_blocks(Stored(mu, nu, scales))
        return blocks.join(mu, length), blocks.join(nu, length)

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """True for real leaves of at most 32 bits, with 4096 elements, half a block in a row."""
        return is_narrow(dtype) and is_large(shape, last=self.block // 2)
