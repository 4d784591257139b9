"""NAdam: Adam that looks one step ahead, with a momentum that warms up."""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.averages import average_moments
from adamfn.bias import bias_correct
from adamfn.ema import Decay, bias, decay, increment
from adamfn.hyperparams import ScalarOrSchedule, scalar
from adamfn.learning_rate import scale_by_lr
from adamfn.state import check_state
from adamfn.storage import Moments, check_moments, step_moments, zero_moments
from adamfn.transform import GradientTransformation, chain
from adamfn.trees import PyTree


class ScaleByNesterovMomentsState(NamedTuple):
    """State of `scale_by_nesterov_moments`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least."""
    nu: PyTree
    """The average v of their squares: likewise, and real."""
    mu_product: chex.Array
    """The product of the momenta of all steps taken: a float scalar."""


def scale_by_nesterov_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    momentum_decay: chex.Numeric = 4e-3,
    *,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides a momentum that looks one step ahead by the root of the average of squares.

    With m and v as in `scale_by_moments`, $c_2 = 1 - b_2^t$, and a momentum that rises from about
    $b_1 / 2$ to $b_1$:

    $$
    \mu_t = b_1 (1 - \tfrac12 \cdot 0.96^{t\psi}), \qquad
    u = \Big(\frac{\mu_{t+1}\, m}{1 - \prod_{i=1}^{t+1} \mu_i}
      + \frac{(1 - \mu_t)\, g}{1 - \prod_{i=1}^{t} \mu_i}\Big)
      \Big/ \big(\sqrt{v} + \sqrt{c_2}\,\epsilon\big)
    $$

    The numerator is corrected for its beginning at zero here, by the products; the denominator by
    `bias_correct(0, b2)` after it.

    Args:
      b1: decay of the gradients' average and the last momentum, in [0, 1); a number or a scalar
        array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0, in units of the gradient.
      momentum_decay: $\psi$, how fast the momentum rises, at least 0.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`; dtypes as in `scale_by_moments`.

    Raises:
      TypeError, ValueError: as `scale_by_moments`.

    References:
      Dozat, Incorporating Nesterov Momentum into Adam, 2016, section 3 and its schedule, as
      torch.optim.NAdam has it.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_nesterov_moments(b1=0.0, b2=0.0)  # no memory: the gradient's sign
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))
    >>> print(updates)
    [ 1. -1.]
    """
    check_moments(moments)
    mean, square, eps = decay("b1", b1), decay("b2", b2), scalar("eps", eps)
    log_rise = scalar("momentum_decay", momentum_decay) * math.log(0.96)

    def init(params: PyTree) -> ScaleByNesterovMomentsState:
        mu, nu = zero_moments("scale_by_nesterov_moments", params, moments)
        return ScaleByNesterovMomentsState(jnp.zeros((), jnp.int32), mu, nu, jnp.ones((), float))

    def momentum(count: chex.Array) -> tuple[chex.Array, chex.Array]:
        missing = 0.5 * jnp.exp(count.astype(float) * log_rise)
        b1 = 1 - mean.complement
        return b1 * (1 - missing), mean.complement + b1 * missing  # the second is 1 - the first

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ScaleByNesterovMomentsState]:
        state = check_state("scale_by_nesterov_moments", state, ScaleByNesterovMomentsState)
        count = increment(state.count)
        now, complement = momentum(count)
        ahead, _ = momentum(increment(count))
        product = state.mu_product * now
        of_mu, of_g = ahead / (1 - product * ahead), complement / (1 - product)
        updates, mu, nu = step_moments(
            "scale_by_nesterov_moments",
            _ratio,
            updates,
            {"mu": state.mu, "nu": state.nu},
            (mean, square, jnp.sqrt(bias(square, count)) * eps, of_mu, of_g),
            moments,
            count,
        )
        return updates, ScaleByNesterovMomentsState(count, mu, nu, product)

    return GradientTransformation(init, update)


def _ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: Decay,
    b2: Decay,
    eps: jax.Array,
    of_mu: jax.Array,
    of_g: jax.Array,
) -> tuple[jax.Array, ...]:
    mu, nu = average_moments(g, mu, nu, b1, b2)
    return (of_mu * mu + of_g * g) / (jnp.sqrt(nu) + eps), mu, nu


def nadam(
    learning_rate: ScalarOrSchedule = 2e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    momentum_decay: chex.Numeric = 4e-3,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""NAdam, by Dozat: torch's, whose momentum warms up.

    With $\mu_t$ as in `scale_by_nesterov_moments` and $\hat v$ as in `adam`:

    $$
    u = -\alpha \Big(\frac{\mu_{t+1}\, m}{1 - \prod_{i=1}^{t+1} \mu_i}
      + \frac{(1 - \mu_t)\, g}{1 - \prod_{i=1}^{t} \mu_i}\Big)
      \Big/ \big(\sqrt{\hat v} + \epsilon\big)
    $$

    The simpler form with a constant momentum, `optax.nadam`, is `adam(nesterov=True)`.

    Args:
      learning_rate: as in `adam`; twice its default, as in torch.
      b1: as in `adam`; the momentum's last value.
      b2: as in `adam`.
      eps: as in `adam`.
      momentum_decay: how fast the momentum rises: its distance to b1 shrinks to 0.96 of itself in
        1 / momentum_decay steps.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`. The state takes 8 bytes a parameter.

    Raises:
      TypeError, ValueError: as `adam`.

    References:
      Dozat, Incorporating Nesterov Momentum into Adam, 2016; torch.optim.NAdam.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.nadam(learning_rate=0.25, b1=0.0)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(params))
    >>> print(updates.round(4))
    [-0.25  0.25]
    """
    return chain(
        scale_by_nesterov_moments(b1, b2, eps, momentum_decay, moments=moments),
        bias_correct(0.0, b2),
        scale_by_lr(learning_rate),
    )
