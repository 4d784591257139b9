"""Inverses and roots of numbers that are 0, infinite, or between 2^-126 and 2^126.

Numbers of any size take a GPU eight operations to divide by. For these one will do, so a kernel
lends its own while it is traced: right to two roundings, as XLA's division on GPU is.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Operations(NamedTuple):
    """How a kernel computes them."""

    inverse: Callable[[jax.Array], jax.Array]
    root: Callable[[jax.Array], jax.Array]


_lent: ContextVar[Operations | None] = ContextVar("lent", default=None)


@contextmanager
def lending(operations: Operations | None) -> Generator[None]:
    """Computes with these operations what is traced inside; None for those of XLA."""
    token = _lent.set(operations)
    try:
        yield
    finally:
        _lent.reset(token)


def quotient(x: chex.Numeric, y: jax.Array) -> jax.Array:
    """`x / y`, of any x."""
    own = _lent.get()
    return jnp.divide(x, y) if own is None else jnp.multiply(x, own.inverse(y))


def root(x: jax.Array) -> jax.Array:
    """The square root; that of a smaller number may be 0."""
    own = _lent.get()
    return jnp.sqrt(x) if own is None else own.root(x)
