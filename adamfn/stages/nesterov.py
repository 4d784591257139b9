"""`scale_by_nesterov_moments`: a momentum that looks one step ahead, and warms up."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import bias, decay, increment
from adamfn.core.formulas import nesterov_ratio
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import Scalars, Stage, exported_state, real_zeros, zeros
from adamfn.formats import Moments
from adamfn.trees import PyTree


@exported_state
class ScaleByNesterovMomentsState(NamedTuple):
    """State of `scale_by_nesterov_moments`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least."""
    nu: PyTree
    """The average v of their squares: likewise, and real."""
    scales: PyTree
    """As in `ScaleByMomentsState`."""
    mu_product: chex.Array
    """The product of the momenta of all steps taken: a float scalar."""


def scale_by_nesterov_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    momentum_decay: chex.Numeric = 4e-3,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides a momentum that looks one step ahead by the root of the average of squares.

    With m and v as in `scale_by_moments`, $c_2 = 1 - b_2^t$, and a momentum that rises from about
    $b_1 / 2$ to $b_1$:

    $$
    \mu_t = b_1 (1 - \tfrac12 \cdot 0.96^{t\psi}), \qquad
    u = \Big(\frac{\mu_{t+1}\, m}{1 - \prod_{i=1}^{t+1} \mu_i}
      + \frac{(1 - \mu_t)\, g}{1 - \prod_{i=1}^{t} \mu_i}\Big)
      \Big/ \big(\sqrt{v + c_2\,\epsilon_\text{root}} + \sqrt{c_2}\,\epsilon\big)
    $$

    The numerator is corrected for its beginning at zero here, by the products; the denominator by
    `bias_correct(0, b2)` after it.

    Args:
      b1: decay of the gradients' average and the last momentum, in [0, 1); a number or a scalar
        array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0, in units of the gradient.
      eps_root: added under the root, as in `scale_by_moments`.
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
    mean, square = decay("b1", b1), decay("b2", b2)
    eps, eps_root = scalar("eps", eps), scalar("eps_root", eps_root)
    log_rise = scalar("momentum_decay", momentum_decay) * math.log(0.96)

    def momentum(count: chex.Array) -> tuple[chex.Numeric, chex.Numeric]:
        missing = 0.5 * jnp.exp(count.astype(float) * log_rise)
        b1 = 1 - mean.complement
        return b1 * (1 - missing), mean.complement + b1 * missing  # the second is 1 - the first

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        now, complement = momentum(count)
        ahead, _ = momentum(increment(count))
        product = state.mu_product * now
        of_mu, of_g = ahead / (1 - product * ahead), complement / (1 - product)
        c2 = bias(square, count)
        roots = jnp.sqrt(c2) * eps, c2 * eps_root
        return (mean.shares, square.shares, *roots, of_mu, of_g), {"mu_product": product}

    return from_stage(
        Stage(
            "scale_by_nesterov_moments",
            nesterov_ratio,
            keeps={"mu": zeros, "nu": real_zeros},
            scalars=scalars,
            start={"mu_product": lambda: jnp.ones((), float)},
            state=ScaleByNesterovMomentsState,
            moments=moments,
        )
    )
