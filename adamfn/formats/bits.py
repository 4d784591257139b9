# SPDX-License-Identifier: Apache-2.0
"""Float32 numbers as integers, and the division and root that a GPU's kernel lends."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adamfn.trees import Numeric

INFINITY = 0x7F800000  # bits of infinity; those of NaN are larger


def bits_of(x: Array) -> Array:
    """The bits of |x|, int32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def float_of(bits: Array) -> Array:
    """The float32 number with these bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def nearest(x: Array) -> Array:
    """The integer nearest to an |x| below 2^22, int32; ties go to even.

    An addition leaves it in the last bits: conversions cost a GPU much. Add no constant to x
    before: XLA merges it with this one, and loses its last bits. The 2 is for ptxas (12.9, 13.0):
    to store the last byte of a sum, it converts the sum to an integer of 8 bits.
    """
    return jax.lax.bitcast_convert_type(x + (1.5 * 2.0**23 + 2), jnp.int32) - 0x4B400002


def near_root(bits: Array) -> Array:
    """From the bits of x > 0, between sqrt(x) and 1.061 sqrt(x); XLA keeps it in no memory."""
    return float_of((bits >> 1) + (127 << 22))


class Operations(NamedTuple):
    """A kernel's inverse and root, right to 2 ulp for 0, infinity, and 2^-126 to 2^126.

    Full-range division takes eight GPU instructions; in this range one does.
    """

    inverse: Callable[[Array], Array]
    root: Callable[[Array], Array]


_lent: ContextVar[Operations | None] = ContextVar("lent", default=None)


@contextmanager
def lending(operations: Operations | None) -> Generator[None]:
    """Uses these operations in what is traced inside; None for XLA's."""
    token = _lent.set(operations)
    try:
        yield
    finally:
        _lent.reset(token)


def quotient(x: Numeric, y: Array) -> Array:
    """`x / y`, for y in the range of `Operations`."""
    lent = _lent.get()
    if lent is not None:
        return jnp.multiply(x, lent.inverse(y))
    alike = jnp.shape(x) == y.shape and jnp.result_type(x) == y.dtype
    return jax.lax.div(x, y) if alike else jnp.divide(x, y)  # the first is faster to trace


def root(x: Array) -> Array:
    """The square root of x in the range of `Operations`; that of a smaller number may be 0."""
    lent = _lent.get()
    return jnp.sqrt(x) if lent is None else lent.root(x)
