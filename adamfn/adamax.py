"""Adamax: Adam with the largest gradient, slowly forgotten, as its denominator."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.averages import scale_by_averages
from adamfn.bias import bias_correct
from adamfn.ema import Decay, average, decay
from adamfn.hyperparams import ScalarOrSchedule, scalar
from adamfn.learning_rate import scale_by_lr
from adamfn.storage import Moments
from adamfn.transform import GradientTransformation, chain
from adamfn.trees import PyTree


class ScaleByInfinityMomentsState(NamedTuple):
    """State of `scale_by_infinity_moments`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least; or at
    each leaf what its format stores."""
    nu: PyTree
    """The largest magnitude v, slowly forgotten: likewise, and real."""


def scale_by_infinity_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by their largest magnitude, slowly forgotten.

    $$
    m \leftarrow m + (1 - b_1)(g - m), \qquad
    v \leftarrow \max(b_2 v,\; |g| + \epsilon), \qquad u = m / v
    $$

    v is no average, so only m needs a correction: `bias_correct(b1, 0)`, after this.

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: how much of the largest magnitude is left after a step, likewise.
      eps: added to the magnitude, at least 0, in units of the gradient.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`; dtypes as in `scale_by_moments`.

    Raises:
      TypeError, ValueError: as `scale_by_moments`.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 2
      (arXiv 1412.6980); eps, which the paper lacks, stands where torch has it.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_infinity_moments(b1=0.0, b2=0.5)
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (4.0, 1.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> print(updates, state.nu)
    [0.5] [2.]
    """
    mean, magnitude, eps = decay("b1", b1), decay("b2", b2), scalar("eps", eps)

    return scale_by_averages(
        "scale_by_infinity_moments",
        _ratio,
        lambda _: (mean, magnitude, eps),
        moments,
        kept_as=ScaleByInfinityMomentsState,
    )


def _ratio(
    g: jax.Array, mu: jax.Array, nu: jax.Array, b1: Decay, b2: Decay, eps: jax.Array
) -> tuple[jax.Array, ...]:
    mu = average(mu, g, b1)
    # b2 nu as an average with 0: a product with a rounded b2 would drift, the same way each step.
    nu = jnp.maximum(average(nu, jnp.zeros_like(nu), b2), jnp.abs(g) + eps)
    return mu / nu, mu, nu


def adamax(
    learning_rate: ScalarOrSchedule = 2e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Adamax, by Kingma and Ba: Adam in the infinity norm.

    $$
    u = -\alpha \frac{m / (1 - b_1^t)}{v}, \qquad v \leftarrow \max(b_2 v,\; |g| + \epsilon)
    $$

    Args:
      learning_rate: as in `adam`; twice its default, as in the paper and torch.
      b1: as in `adam`.
      b2: how much of the largest magnitude is left after a step, in [0, 1).
      eps: added to the gradient's magnitude, as in torch.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`. The state takes 8 bytes a parameter.

    Raises:
      TypeError, ValueError: as `adam`.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 2
      (arXiv 1412.6980).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.adamax(learning_rate=0.25)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(params))
    >>> print(updates.round(4))
    [-0.25  0.25]
    """
    return chain(
        scale_by_infinity_moments(b1, b2, eps, moments=moments),
        bias_correct(b1, 0.0),
        scale_by_lr(learning_rate),
    )
