# SPDX-License-Identifier: Apache-2.0
"""Codecs, which store one moment whatever the other is, and `Pair`, a format made of two."""

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.formats.bits import INFINITY, bits_of, float_of, near_root, quotient
from adamfn.formats.blocks import InBlocks, Largest, along_last, join
from adamfn.formats.format import (
    BaseFormat,
    Elementwise,
    MeshAxes,
    Stored,
    answer,
    is_large,
    is_narrow,
)
from adamfn.formats.noise import halves, threshold
from adamfn.trees import at_least, shown


class Encoded(NamedTuple):
    """One moment of one leaf: codes of its shape, or None, and a tree of arrays of other shapes."""

    codes: Array | None
    scales: Any = ()


class Codec(Protocol):
    """How one moment of one leaf is stored, whatever the other is; like a `Format` otherwise.

    `encode` takes float32, and for each element 16 random bits, int32, or None to round to
    nearest. `decode` returns float32, for nu of any shape that broadcasts to the leaf's.
    """

    def encode(self, x: Array, bits: Array | None) -> Encoded: ...

    def decode(self, codes: Any, scales: Any) -> Array: ...

    def holds(self, shape: tuple[int, ...]) -> bool: ...


def kind_of(value: Any) -> str | None:
    """The kind: "codec" if its `holds` takes only a shape, else "format"; or None."""
    methods = (getattr(value, name, None) for name in ("encode", "decode", "holds"))
    if isinstance(value, type) or not all(map(callable, methods)):
        return None
    return "codec" if len(inspect.signature(value.holds).parameters) == 1 else "format"


@dataclass(frozen=True)
class Pair(BaseFormat):
    """Stores mu by one codec and nu by another, for real leaves of at most 32 bits that both hold.

    Beside means of nu, `Linear` stores mu in units of nu's root, as decoded: its levels then follow
    rows and columns of unlike gradients. Scales are negative there, and mu is 0 where nu is.

    Raises:
      TypeError, ValueError: one of them is not a codec; mu's codec keeps only means.

    >>> import jax.numpy as jnp
    >>> from adamfn.formats import Factored
    >>> format = Pair(mu=Exact(), nu=Factored())
    >>> mu, nu = format.decode(format.encode(jnp.ones((128, 128)), jnp.ones((128, 128)), None))
    >>> print(nu.shape, nu.min(), nu.max())
    (128, 128) 1.0 1.0
    """

    mu: Codec
    nu: Codec

    def __post_init__(self) -> None:
        for moment, codec in (("mu", self.mu), ("nu", self.nu)):
            if kind_of(codec) != "codec":
                raise TypeError(
                    f"Pair: {moment} is {shown(codec)}; expected a codec of one moment: Exact(),"
                    " Rounded(), Linear(), Factored(), BlockMean() or an object like them."
                )
        if answer(self.mu, "factors"):
            raise ValueError(
                f"Pair: mu is {shown(self.mu)}, which keeps means alone; expected a codec that"
                " keeps every element, such as Linear()."
            )

    def encode(self, mu: Array, nu: Array, noise: Array | None) -> Stored:
        mu_bits, nu_bits = halves(noise)
        nu_codes, nu_scales = self.nu.encode(nu, nu_bits)
        if self.factors:
            mu = _over_root(mu, self.nu.decode(nu_codes, nu_scales))
        mu_codes, mu_scales = self.mu.encode(mu, mu_bits)
        return Stored(mu_codes, nu_codes, (-mu_scales if self.factors else mu_scales, nu_scales))

    def decode(self, stored: Stored) -> tuple[Array, Array]:
        mu_scales, nu_scales = stored.scales
        mu, nu = self.mu.decode(stored.mu, mu_scales), self.nu.decode(stored.nu, nu_scales)
        mu = _times_root(mu, stored.mu, nu) if self.factors else mu
        return mu, jnp.broadcast_to(nu, mu.shape)

    def holds(self, shape: tuple[int, ...], dtype: Any) -> bool:
        return is_narrow(dtype) and self.mu.holds(shape) and self.nu.holds(shape)

    def _both(self, name: str) -> tuple[Any, Any]:
        return answer(self.mu, name), answer(self.nu, name)

    stores_rows = property(lambda self: all(self._both("stores_rows")))
    block = property(lambda self: _common([x for x in self._both("block") if x != 0] or [0]))
    native_code = property(lambda self: _common(self._both("native_code")))
    largest = property(lambda self: min(filter(None, self._both("largest")), default=None))

    @property
    def factors(self) -> Any:
        return answer(self.nu, "factors") if answer(self.mu, "kernel_block") else None

    @property
    def kernel_block(self) -> int | None:
        return 0 if self._both("kernel_block") == (0, 0) else None

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        return answer(self.mu, "ends")(mu, nu)

    def resized(self, block: int) -> "Pair":
        return Pair(*(resized(block) for resized in self._both("resized")))

    def on_shards(self, split: MeshAxes) -> "Pair":
        return Pair(*(on_shards(split) for on_shards in self._both("on_shards")))


def _over_root(mu: Array, nu: Array) -> Array:
    """The ratio of mu to about the root of nu; 0 where nu is.

    A power of 2 stands for nu: the last bits of means depend on how devices split the leaf.
    """
    bits = bits_of(nu) & INFINITY
    return mu * jnp.where(bits == 0, 0, quotient(1.0, near_root(bits)))


def _times_root(mu: Array, codes: Any, nu: Array) -> Array:
    """The inverse where scales are negative; others, in states of 0.2.0, are those of mu itself."""
    root = near_root(bits_of(nu) & INFINITY)
    return jnp.where(codes.astype(jnp.float32) * mu < 0, mu * -root, mu)


def _common(values: Any) -> Any:
    return values[0] if len(set(values)) == 1 else None


@dataclass(frozen=True)
class Exact(Elementwise):
    """Four bytes a parameter, without loss, for leaves of any shape.

    >>> import jax.numpy as jnp
    >>> print(Exact().decode(*Exact().encode(jnp.array([0.1]), None)))
    [0.1]
    """

    def encode(self, x: Array, bits: Array | None) -> Encoded:
        return Encoded(x)

    def decode(self, codes: Array, scales: Any) -> Array:
        return codes

    def holds(self, shape: tuple[int, ...]) -> bool:
        return True


@dataclass(frozen=True)
class Rounded(Elementwise):
    """Two bytes a parameter: bfloat16, for leaves of `least` elements and more.

    It has the upper half of a float32's bits. Adding 16 random bits and dropping the lower half
    rounds up with probability (lower half) / 2^16: without bias. To nearest (`stochastic=False`),
    nu would stop: with b2 = 0.999 a step moves it by a thousandth, and bfloat16 numbers are 0.4 to
    0.8 per cent apart. Infinities and NaN stay what they are.

    >>> import jax.numpy as jnp
    >>> x = jnp.full(2, 1 + 2**-9)  # a quarter of the way to the next
    >>> print(Rounded().encode(x, jnp.array([0xBFFF, 0xC000])).codes)
    [1 1.00781]
    """

    stochastic: bool = True
    least: int = 4096
    native_code = property(lambda self: 1 if self.stochastic else 2)

    def encode(self, x: Array, bits: Array | None) -> Encoded:
        if bits is None or not self.stochastic:
            return Encoded(x.astype(jnp.bfloat16))
        x_bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        # In float32, which holds the upper half exactly: 16-bit integers cost a TPU a copy.
        rounded = float_of((x_bits + bits) & ~0xFFFF)
        finite = (x_bits & INFINITY) != INFINITY
        return Encoded(jnp.where(finite, rounded, x).astype(jnp.bfloat16))

    def decode(self, codes: Array, scales: Any) -> Array:
        return codes.astype(jnp.float32)

    def holds(self, shape: tuple[int, ...]) -> bool:
        return at_least(math.prod(shape), self.least)


@dataclass(frozen=True)
class Linear(InBlocks):
    """One byte a parameter, and 4 for each block of up to 256 along the last axis.

    A code l, int8 from -127 to 127, decodes to `l * scale`, where scale, float32 of
    (..., ceil(n / size)), is the block's largest magnitude over 127 (Dettmers et al., 2022, arXiv
    2110.02861). Rounding is unbiased. It suits mu where a block's gradients are of one size;
    `EightBit` also serves those of many. Not for nu, which would round to zero. An infinity or NaN
    makes its whole block so. It holds leaves of 4096 elements, half a block in a row.

    >>> import jax.numpy as jnp
    >>> print(Linear().encode(jnp.array([1.0, -0.5, 0.0, 0.25]), None).codes)
    [127 -63   0  32]
    """

    def encode(self, x: Array, bits: Array | None) -> Encoded:
        blocks, bits = self.split((x, bits))
        codes, scale = self.encode_blocks(blocks, bits, along_last)
        return Encoded(join(codes, x.shape[-1]).astype(jnp.int8), scale[..., 0])

    def decode(self, codes: Array, scales: Any) -> Array:
        return join(self.decode_blocks(self.split(codes), scales[..., None]), codes.shape[-1])

    def holds(self, shape: tuple[int, ...]) -> bool:
        return is_large(shape, last=self.block // 2)

    def encode_blocks(self, x: Array, bits: Array | None, largest: Largest) -> tuple[Array, Array]:
        """Codes of whole blocks in float32, and scales with 1 in place of a block."""
        scale = float_of(largest(bits_of(x))) * (1 / 127)
        # Not in denormals: their reciprocals are infinite.
        per_code = jnp.where(scale < 2.0**-125, 0, 1 / jnp.maximum(scale, 2.0**-125))
        return jnp.clip(jnp.floor(x * per_code + threshold(bits)), -127, 127), scale

    def decode_blocks(self, codes: Array, scale: Array) -> Array:
        """The inverse of `encode_blocks`."""
        return codes.astype(jnp.float32) * scale

    def ends(self, mu: Any, nu: Any) -> dict[str, Array]:
        return {"largest": jnp.abs(mu) == 127}
