"""Answers of formats."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.formats.base import Stored, halves
from adamfn.formats.bfloat16 import Rounded
from adamfn.formats.blockmean import BlockMean
from adamfn.formats.blocks import Extremes
from adamfn.formats.blockwise import Blockwise
from adamfn.formats.factored import Factored
from adamfn.formats.linear import Linear
from adamfn.formats.pair import Pair


class _InTile(NamedTuple):
    format: Any
    inside: Any
    over: Extremes

    def encode(self, mu: jax.Array, nu: jax.Array, noise: jax.Array | None) -> Stored:
        if self.inside is not None:
            mu, nu = (jnp.where(self.inside, x, 0) for x in (mu, nu))
        if isinstance(self.format, Blockwise):
            return self.format.encode_blocks(mu, nu, noise, self.over)
        if not answer(self.format, "factors"):
            return self.format.encode(mu, nu, noise)
        codes, scale = self.format.mu.encode_blocks(mu, halves(noise)[0], self.over)
        return Stored(codes, None, (scale, None))

    def decode(self, stored: Stored) -> tuple[jax.Array, jax.Array]:
        if isinstance(self.format, Blockwise):
            return self.format.decode_blocks(stored)
        if not answer(self.format, "factors"):
            return self.format.decode(stored)
        scale, factors = stored.scales
        mu = self.format.mu.decode_blocks(stored.mu, scale)
        return mu, jnp.broadcast_to(math.prod(jax.tree.leaves(factors)), mu.shape)


def answer(format: Any, name: str) -> Any:
    """Until formats answer for themselves."""
    blockwise = (
        isinstance(format, Blockwise)
        and type(format).encode is Blockwise.encode
        and type(format).decode is Blockwise.decode
    )
    pair = type(format) is Pair
    by_factors = pair and type(format.mu) is Linear and type(format.nu) in (Factored, BlockMean)
    match name:
        case "kernel_block":
            if format is None or (pair and {type(format.mu), type(format.nu)} == {Rounded}):
                return 0
            return format.block if blockwise else format.mu.block if by_factors else None
        case "factors":
            return format.nu.factors if by_factors else None
        case "in_tile":
            return partial(_InTile, format)
        case "stores_rows":
            means = pair and (
                type(format.nu) is Factored or (type(format.nu) is BlockMean and format.nu.axis != -1)
            )
            found = format is None or blockwise or (pair and not means)
            return found or getattr(format, "stores_rows", False)
        case _:
            raise KeyError(name)
