"""`scale_by_infinity_moments`: the largest gradient, slowly forgotten, as the denominator."""

from typing import NamedTuple

import chex

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import decay
from adamfn.core.formulas import infinity_ratio
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import exported_state
from adamfn.formats import Moments
from adamfn.stages.two_moments import from_moments
from adamfn.trees import PyTree


@exported_state
class ScaleByInfinityMomentsState(NamedTuple):
    """State of `scale_by_infinity_moments`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least; or as
    in `ScaleByMomentsState`."""
    nu: PyTree
    """The largest magnitude v, slowly forgotten: likewise, and real."""
    scales: PyTree
    """As in `ScaleByMomentsState`."""


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
    return from_moments(
        "scale_by_infinity_moments",
        infinity_ratio,
        lambda _: (mean.shares, magnitude.shares, eps),
        moments,
        state=ScaleByInfinityMomentsState,
    )
