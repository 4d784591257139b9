"""What a fused step needs besides arrays, the same for every leaf."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.bias import correction
from adamfn.ema import Decay, decay
from adamfn.moments import ratio_scalars


class Scalars(NamedTuple):
    """The scalars of a step, in the order in which native code has them (native/step.h)."""

    complement1: chex.Numeric
    """1 - b1"""
    complement2: chex.Numeric
    """1 - b2"""
    rate1: chex.Numeric
    """b1, or 1 where it is known to be at least 1/2."""
    rate2: chex.Numeric
    """b2, likewise."""
    eps: chex.Numeric
    """eps sqrt(c2)"""
    eps_root: chex.Numeric
    """eps_root c2"""
    ahead: chex.Numeric
    """c1(t) / c1(t + 1), of Nesterov's form; 1 without."""
    correction: chex.Numeric
    """sqrt(c2) / c1"""
    weight_decay: chex.Numeric
    learning_rate: chex.Numeric

    @property
    def b1(self) -> Decay:
        """The decay of the gradients' average."""
        return Decay(self.complement1, jnp.nan, self.rate1)

    @property
    def b2(self) -> Decay:
        """The decay of the squares' average."""
        return Decay(self.complement2, jnp.nan, self.rate2)

    def as_vector(self) -> jax.Array:
        """All of them in one float32 array."""
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in self])


def scalars_at(
    b1: chex.Numeric,
    b2: chex.Numeric,
    eps: chex.Numeric,
    eps_root: chex.Numeric,
    *,
    nesterov: bool,
) -> Callable[[chex.Array, chex.Numeric, chex.Numeric], Scalars]:
    """Checks the hyperparameters, and returns what makes the scalars of a step.

    That is a function of the step's count, the weight decay and the learning rate.
    """
    of_ratio = ratio_scalars(b1, b2, eps, eps_root, nesterov=nesterov)
    mean, square = decay("b1", b1), decay("b2", b2)

    def scalars(
        count: chex.Array, weight_decay: chex.Numeric, learning_rate: chex.Numeric
    ) -> Scalars:
        *_, scaled_eps, scaled_eps_root, ahead = of_ratio(count)
        return Scalars(
            mean.complement,
            square.complement,
            1.0 if mean.rate is None else mean.rate,
            1.0 if square.rate is None else square.rate,
            scaled_eps,
            scaled_eps_root,
            1.0 if ahead is None else ahead,
            correction(mean, square, count),
            weight_decay,
            learning_rate,
        )

    return scalars
