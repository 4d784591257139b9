# SPDX-License-Identifier: Apache-2.0
"""The decays of averages, and the correction of their bias. `formulas.average` is the average.

Only here are 1 - b and 1 - b^t computed. They must agree: a correction by a 1 - b^t that was not
made from the 1 - b of the average is wrong at every step.
"""

import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from adamfn.core.hyperparameters import scalar
from adamfn.trees import Numeric

_LOG_OF_ZERO = -1000.0  # its exponential is 0; an infinity would trip JAX's checks


class Decay(NamedTuple):
    """The decay b of an average, as formulas need it; `decay` makes one."""

    complement: Numeric  # 1 - b
    rate: Numeric | None
    """b, or None where it is known to be at least 1/2, which saves a select in every leaf."""

    @property
    def log(self) -> Numeric:
        """Log b, from the 1 - b of the average; in double precision if that is a number."""
        if isinstance(self.complement, float):
            return math.log1p(-self.complement) if self.complement < 1 else _LOG_OF_ZERO
        zero = self.complement == 1
        return jnp.where(zero, _LOG_OF_ZERO, jnp.log1p(-jnp.where(zero, 0.5, self.complement)))

    def bias(self, count: jax.Array) -> jax.Array:
        """`1 - b^count`: an average from zero holds so much of a constant 1 after `count` steps.

        For b = 0.999 in float32, `-expm1(count log b)` is right to 2e-7; the difference is off by
        2e-5 at the second step.
        """
        return -jnp.expm1(count.astype(float) * self.log)


Decays: TypeAlias = tuple[Decay, Decay]
"""b1 and b2."""

NO_DECAY = Decay(1.0, 0.0)
_USUAL = Decay(1 - 0.9, None), Decay(1 - 0.999, None)


class Averages(NamedTuple):
    """The hyperparameters of a stage of moments; from `at_step`, its formula's scalars."""

    b1: Decay
    b2: Decay
    eps: Numeric
    """Added to the root of nu: of the corrected nu; after `at_step`, of the uncorrected one."""
    eps_root: Numeric
    """Added to nu under the root, likewise."""

    @classmethod
    def of(cls, b1: Any, b2: Any, eps: Any = 0.0, eps_root: Any = 0.0) -> "Averages":
        """The hyperparameters, checked as `decay` and `scalar` check them."""
        decays = decay("b1", b1), decay("b2", b2)
        return cls(*decays, scalar("eps", eps), scalar("eps_root", eps_root))

    @property
    def decays(self) -> Decays:
        """Both decays."""
        return self.b1, self.b2

    def at_step(self, count: jax.Array) -> "Averages":
        """The scalars at a step."""
        c2 = self.b2.bias(count)
        return self._replace(eps=jnp.sqrt(c2) * self.eps, eps_root=c2 * self.eps_root)

    def correction(self, count: jax.Array) -> jax.Array:
        """The factor of `bias_correct` at a step: sqrt(c2) / c1."""
        return jnp.sqrt(self.b2.bias(count)) / self.b1.bias(count)

    def ahead(self, count: jax.Array) -> jax.Array:
        """Nesterov's factor of mu at a step: `c1(t) / c1(t + 1)`."""
        return self.b1.bias(count) / self.b1.bias(increment(count))


def decay(name: str, value: Any) -> Decay:
    """Checks a decay, a number in [0, 1) or a scalar array, and takes 1 - b from it once.

    A number's is taken in double precision. An array's b has only its own precision:
    `optax.inject_hyperparams` makes 0.999 a float32, whose 1 - b is off by 1.3e-5 (optax issue
    1532). Raises as `scalar`.
    """
    rate = scalar(name, value, below=1)
    return Decay(1 - rate, None if isinstance(rate, float) and rate >= 0.5 else rate)


def decays_of(caller: str, before: Decays | None, *given: Decay | None) -> Decays:
    """b1 and b2: the given ones, else those of the averages before, else 0.9 and 0.999.

    Raises:
      ValueError: one is neither that of the averages nor 0, which leaves one uncorrected.
    """
    found: list[Decay] = []
    for name, own, its, usual in zip(("b1", "b2"), given, before or given, _USUAL, strict=True):
        b, other = own or its or usual, its or own or usual
        pair = b.complement, other.complement
        if all(isinstance(x, float) for x in pair) and pair[0] not in (1, pair[1]):
            raise ValueError(
                f"{caller}: {name} is {1 - pair[0]:.6g}, and that of the moments before it is"
                f" {1 - pair[1]:.6g}; expected the same. Without {name}= it is taken from them."
            )
        found.append(b)
    return found[0], found[1]


def increment(count: jax.Array) -> jax.Array:
    """The next count; it stops at 2^31 - 1."""
    return jnp.minimum(count, 2**31 - 2) + 1
