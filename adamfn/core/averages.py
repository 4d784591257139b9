"""The exponential moving average and its bias.

The one place where 1 - b and 1 - b^t are taken. They must agree: a correction by a 1 - b^t that
was not made from the 1 - b of the average is wrong at every step.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.core.hyperparameters import scalar

_LAST_COUNT = jnp.iinfo(jnp.int32).max

_LOG_OF_ZERO = -1000.0
"""Its exponential is zero in every dtype. JAX's checks would report an infinity."""


class Shares(NamedTuple):
    """The decay b of an average, as the formula of a leaf needs it."""

    complement: chex.Numeric
    """1 - b"""
    rate: chex.Numeric | None
    """b, or None where it is known to be at least 1/2, which saves a select in every leaf."""


class Decay(NamedTuple):
    """The decay b of an average, as what is derived from it while it is still exact."""

    shares: Shares
    log: chex.Numeric
    """log b"""

    @property
    def complement(self) -> chex.Numeric:
        """1 - b."""
        return self.shares.complement


def decay(name: str, value: Any) -> Decay:
    """Checks a decay rate and derives 1 - b and log b from it.

    From a number they are taken in double precision. From an array, whose b is only known to its
    own precision, both are taken from the same rounded 1 - b. (optax.inject_hyperparams makes
    b = 0.999 a float32, whose 1 - b is 1.3e-5 off that of the double: optax issue 1532.)

    Args:
      name: what the error message calls it.
      value: a number in [0, 1) or a scalar array of float32 at least.

    Returns:
      The `Decay`.

    Raises:
      TypeError, ValueError: as `adamfn.core.hyperparameters.scalar`.
    """
    rate = scalar(name, value, below=1)
    if isinstance(rate, float):
        log = math.log(rate) if rate else _LOG_OF_ZERO
        return Decay(Shares(1 - rate, rate if rate < 0.5 else None), log)
    complement = 1 - rate
    some = jnp.where(rate == 0, 0.5, complement)
    return Decay(Shares(complement, rate), jnp.where(rate == 0, _LOG_OF_ZERO, jnp.log1p(-some)))


def average(old: jax.Array, new: jax.Array, b: Shares) -> jax.Array:
    """One step of the average, `b old + (1 - b) new`.

    It is written as a step from the nearer end, which rounds about half as much, and for b = 0
    returns `new` to the last bit.
    """
    step = new - old
    from_old = old + b.complement * step
    return from_old if b.rate is None else jnp.where(b.rate < 0.5, new - b.rate * step, from_old)


def bounded(g: jax.Array) -> jax.Array:
    """The gradient, but 2^48 for what is larger and finite; in float64 2^480.

    The square of a larger one, or the sum of many in a mean of a format, would overflow, and its
    element would never recover. Adam's ratio hardly sees the bound: both of its moments then hold
    this gradient and nothing else. Infinities and NaN stay visible.
    """
    info = jnp.finfo(g.dtype)
    largest = 2.0**480 if info.bits == 64 else 2.0**48
    if jnp.iscomplexobj(g):
        size = jnp.maximum(abs(g.real), abs(g.imag))
        over = (size > largest) & (size <= info.max)
        return g * jnp.where(over, largest / jnp.where(over, size, 1), 1)
    return jnp.where(abs(g) <= info.max, jnp.clip(g, -largest, largest), g)


def average_moments(
    g: jax.Array, mu: jax.Array, nu: jax.Array, b1: Shares, b2: Shares
) -> tuple[jax.Array, jax.Array]:
    """One step of both averages of a leaf: of g, and of |g|^2."""
    return average(mu, g, b1), average(nu, jnp.real(g * jnp.conj(g)), b2)


def bias(b: Decay, count: jax.Array) -> jax.Array:
    """`1 - b^count`: what an average that began at zero holds of a constant after `count` steps.

    For b = 0.999 in float32, `-expm1(count log b)` is right to 2e-7, where the difference
    `1 - b^count` is 2e-5 off at the second step.
    """
    return -jnp.expm1(count.astype(float) * b.log)


def increment(count: jax.Array) -> jax.Array:
    """The next count, which stays at 2^31 - 1 once there."""
    return jnp.minimum(count, _LAST_COUNT - 1) + 1
