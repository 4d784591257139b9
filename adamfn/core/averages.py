"""The exponential moving average and the correction of its bias.

Only here are 1 - b and 1 - b^t computed. They must agree: a correction by a 1 - b^t that was not
made from the 1 - b of the average is wrong at every step.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from adamfn.core.hyperparameters import scalar

_LAST_COUNT = jnp.iinfo(jnp.int32).max

_LOG_OF_ZERO = -1000.0
"""Its exponential is 0 in every dtype. An infinity would trip JAX's checks."""


class Shares(NamedTuple):
    """The decay b of an average, as a formula needs it."""

    complement: chex.Numeric
    """1 - b"""
    rate: chex.Numeric | None
    """b, or None where it is known to be at least 1/2, which saves a select in every leaf."""


class Decay(NamedTuple):
    """The decay b of an average, and what is derived from b while it is still exact."""

    shares: Shares
    log: chex.Numeric
    """log b"""

    @property
    def complement(self) -> chex.Numeric:
        """1 - b."""
        return self.shares.complement


class MomentScalars(NamedTuple):
    """The scalars that a stage of moments gives to its formula at one step."""

    b1: Shares
    b2: Shares
    eps: Any = None
    """Added to the root of nu, in units of the uncorrected root."""
    eps_root: Any = None
    """Added to nu under the root, in units of the uncorrected nu."""


class Averages:
    """The hyperparameters of a stage of moments, checked as `decay` and `scalar` check them."""

    def __init__(
        self,
        b1: chex.Numeric,
        b2: chex.Numeric,
        eps: chex.Numeric = 0.0,
        eps_root: chex.Numeric = 0.0,
    ) -> None:
        self.b1, self.b2 = decay("b1", b1), decay("b2", b2)
        self.eps, self.eps_root = scalar("eps", eps), scalar("eps_root", eps_root)

    def at(self, count: jax.Array) -> MomentScalars:
        """The scalars of a step, where eps and eps_root are in units of the corrected nu."""
        c2 = bias(self.b2, count)
        return MomentScalars(
            self.b1.shares, self.b2.shares, jnp.sqrt(c2) * self.eps, c2 * self.eps_root
        )

    def correction(self, count: jax.Array) -> jax.Array:
        """The factor of `bias_correct` at a step: sqrt(c2) / c1."""
        return jnp.sqrt(bias(self.b2, count)) / bias(self.b1, count)


def decay(name: str, value: Any) -> Decay:
    """Checks a decay, a number in [0, 1) or a scalar array, and derives 1 - b and log b from it.

    A number's are derived in double precision. An array's b has only its own precision, so both
    come from the same rounded 1 - b. (`optax.inject_hyperparams` makes 0.999 a float32, whose 1 - b
    is off by 1.3e-5: optax issue 1532.)

    Raises:
      TypeError, ValueError: as `scalar`.
    """
    rate = scalar(name, value, below=1)
    if isinstance(rate, float):
        log = math.log(rate) if rate else _LOG_OF_ZERO
        return Decay(Shares(1 - rate, rate if rate < 0.5 else None), log)
    complement = 1 - rate
    some = jnp.where(rate == 0, 0.5, complement)
    return Decay(Shares(complement, rate), jnp.where(rate == 0, _LOG_OF_ZERO, jnp.log1p(-some)))


def times(x: jax.Array, factor: chex.Numeric) -> jax.Array:
    """The product of an array and a scalar. Operations of `lax` are faster to trace."""
    return lax.mul(x, lax.full_like(x, factor))


def plus(x: jax.Array, term: chex.Numeric) -> jax.Array:
    """The sum of an array and a scalar."""
    return lax.add(x, lax.full_like(x, term))


def average(old: jax.Array, new: jax.Array, b: Shares) -> jax.Array:
    """One step of the average, `b old + (1 - b) new`.

    It steps from the nearer end: that rounds about half as much, and with b = 0 it returns `new` to
    the last bit.
    """
    step = lax.sub(new, old)
    from_old = lax.add(old, times(step, b.complement))
    return from_old if b.rate is None else jnp.where(b.rate < 0.5, new - b.rate * step, from_old)


def bounded(g: jax.Array) -> jax.Array:
    """The gradient, with finite values larger than 2^48 (in float64 2^480) set to that bound.

    Their squares, or a format's sums of squares, would overflow, and the element would never
    recover. Adam's ratio hardly changes: both moments then hold this gradient and little else.
    Infinities and NaN stay visible.
    """
    info = jnp.finfo(g.dtype)
    largest = 2.0**480 if info.bits == 64 else 2.0**48
    if jnp.iscomplexobj(g):
        size = jnp.maximum(abs(g.real), abs(g.imag))
        over = (size > largest) & (size <= info.max)
        return g * jnp.where(over, largest / jnp.where(over, size, 1), 1)
    finite = lax.le(lax.abs(g), lax.full_like(g, info.max))
    return lax.select(finite, lax.clamp(-largest, g, largest), g)


def averaged(
    g: jax.Array, mu: jax.Array, nu: jax.Array, at: MomentScalars
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The bounded gradient, and both averages after it: of g and of |g|^2."""
    g = bounded(g)
    square = jnp.real(g * jnp.conj(g)) if jnp.iscomplexobj(g) else lax.mul(g, g)
    return g, average(mu, g, at.b1), average(nu, square, at.b2)


def bias(b: Decay, count: jax.Array) -> jax.Array:
    """`1 - b^count`: the share of a constant that an average from zero holds after `count` steps.

    For b = 0.999 in float32, `-expm1(count log b)` is right to 2e-7. The difference `1 - b^count`
    is off by 2e-5 at the second step.
    """
    return -jnp.expm1(count.astype(float) * b.log)


def increment(count: jax.Array) -> jax.Array:
    """The next count; it stops at 2^31 - 1."""
    return jnp.minimum(count, _LAST_COUNT - 1) + 1
