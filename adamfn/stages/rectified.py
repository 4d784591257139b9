"""`scale_by_rectified_moments`: a denominator that counts once enough gradients are in it."""

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import Decay, bias, decay
from adamfn.core.formulas import rectified_ratio
from adamfn.core.hyperparameters import scalar
from adamfn.formats import Moments
from adamfn.stages.two_moments import from_moments
from adamfn.trees import PyTree


def scale_by_rectified_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of squares once that can be trusted.

    With m and v as in `scale_by_moments`, $c_2 = 1 - b_2^t$, and the number $\rho$ of gradients
    that v is worth:

    $$
    \rho_\infty = \frac{2}{1 - b_2} - 1, \qquad \rho = \rho_\infty - 2 t b_2^t / c_2, \qquad
    r = \sqrt{\frac{(\rho - 4)(\rho - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho}}
    $$

    $$
    u = \frac{r\, m}{\sqrt{v + c_2\,\epsilon_\text{root}} + \epsilon} \;\text{ if } \rho > 5, \qquad
    u = \frac{m}{\sqrt{c_2}} \;\text{ otherwise}
    $$

    so that `bias_correct(b1, b2)` after it makes the second $m / c_1$. eps is in units of the
    uncorrected root here, and the bound is 5, as in torch (the paper has 4 and no eps).

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise; under 2/3, $\rho$ never exceeds 5.
      eps: added to the root, at least 0.
      eps_root: added under the root, as in `scale_by_moments`.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`; state and dtypes as in `scale_by_moments`. $\rho$ is right to
      some float32 roundings also where its two terms cancel.

    Raises:
      TypeError, ValueError: as `scale_by_moments`.

    References:
      Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020, algorithm 2
      (arXiv 1908.03265).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_rectified_moments(b1=0.5)
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))
    >>> print((updates * 0.001**0.5).round(4))  # no division yet: the average of the gradients
    [ 1.5 -2.5]
    """
    mean, square = decay("b1", b1), decay("b2", b2)
    eps, eps_root = scalar("eps", eps), scalar("eps_root", eps_root)

    def scalars(count: jax.Array) -> tuple[PyTree, ...]:
        rho, c2 = _gradients_in(square, count), bias(square, count)
        rectification = jnp.where(rho > 5, _rectification(rho, square), 0)
        untrusted = jax.lax.rsqrt(c2)
        return mean.shares, square.shares, eps, c2 * eps_root, rectification, untrusted

    return from_moments("scale_by_rectified_moments", rectified_ratio, scalars, moments)


def _gradients_in(b2: Decay, count: chex.Array) -> jax.Array:
    """The number rho of gradients that an average is worth after `count` steps.

    With x = -log b2, z = t x / 2 and L(z) = coth z - 1 / z it is also L(x / 2) + t (1 - L(z)),
    where the two large terms of its definition, which cancel for small z, are gone.
    """
    steps = count.astype(float)
    x = jnp.negative(b2.log)
    early = _langevin(x / 2) + steps * (1 - _langevin(steps * x / 2))
    late = 2 / b2.complement - 1 - 2 * steps / jnp.expm1(steps * x)
    return jnp.where(steps * x < 1, early, late)


def _langevin(z: chex.Numeric) -> chex.Numeric:
    # Its continued fraction, right to 1e-8 for z up to 1/2.
    return z / (3 + z * z / (5 + z * z / (7 + z * z / 9)))


def _rectification(rho: jax.Array, b2: Decay) -> jax.Array:
    # Neither is used below 5, where a root may be negative.
    rho, rho_inf = jnp.maximum(rho, 5), jnp.maximum(2 / b2.complement - 1, 5)
    return jnp.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
