"""`Linear`: a moment in even 8-bit levels, by blocks."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.formats import blocks
from adamfn.formats.base import is_large, threshold
from adamfn.formats.blocks import Extremes
from adamfn.formats.codec import Encoded
from adamfn.formats.floats import bits_of, float_of


@dataclass(frozen=True)
class Linear:
    """One byte a parameter, and 4 for each block of up to 256 along the last axis.

    Codes are int8, -127 to 127, and scales float32 of (..., ceil(n / size)). A code l decodes to
    `l * scale`, where scale is the block's largest magnitude over 127. Rounding is stochastic and
    unbiased. It suits mu where a block's gradients are of one size; beside nu for each element,
    `EightBit` also serves those of many. Not for nu, which would round to zero.

    An infinity or NaN makes its whole block infinite or NaN.

    Attributes:
      block: the largest size of a block, a multiple of 16.

    References:
      Dettmers, Lewis, Shleifer and Zettlemoyer, 8-bit Optimizers via Block-wise Quantization, 2022
      (arXiv 2110.02861).

    >>> import jax.numpy as jnp
    >>> print(Linear().encode(jnp.array([1.0, -0.5, 0.0, 0.25]), None).codes)
    [127 -63   0  32]
    """

    block: int = 256

    def __post_init__(self) -> None:
        """Checks the block size."""
        blocks.check_size("Linear", self.block)

    def encode(self, x: jax.Array, bits: jax.Array | None) -> Encoded:
        """Returns codes and the scales of their blocks."""
        length = x.shape[-1]
        size = blocks.size_for(length, self.block)
        scale, per_code = _scales(blocks.BY_XLA.largest(bits_of(blocks.split(x, size))))
        codes = _codes(x, blocks.spread(per_code, size, length), bits)
        return Encoded(codes.astype(jnp.int8), scale[..., 0])

    def encode_blocks(
        self, x: jax.Array, bits: jax.Array | None, over: Extremes
    ) -> tuple[jax.Array, jax.Array]:
        """Codes of whole blocks in float32, and scales with 1 where a block was."""
        scale, per_code = _scales(over.largest(bits_of(x)))
        return _codes(x, per_code, bits), scale

    def decode(self, codes: jax.Array, scales: Any) -> jax.Array:
        """Returns it in float32."""
        length = codes.shape[-1]
        size = blocks.size_for(length, self.block)
        return self.decode_blocks(codes, blocks.spread(scales[..., None], size, length))

    def decode_blocks(self, codes: jax.Array, scale: jax.Array) -> jax.Array:
        """The inverse of `encode_blocks`."""
        return codes.astype(jnp.float32) * scale

    def holds(self, shape: tuple[int, ...]) -> bool:
        """True for 4096 elements and more, half a block in a row."""
        return is_large(shape, last=self.block // 2)


def _scales(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a code is times, and what is made a code by."""
    scale = float_of(largest) * (1 / 127)
    # Not in denormals: their reciprocals are infinite.
    return scale, jnp.where(scale < 2.0**-125, 0, 1 / jnp.maximum(scale, 2.0**-125))


def _codes(x: jax.Array, per_code: jax.Array, bits: jax.Array | None) -> jax.Array:
    return jnp.clip(jnp.floor(x * per_code + threshold(bits)), -127, 127)
