"""`scale_by_atan2_moments`: Adam's ratio as an angle, which needs no eps."""

import chex

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import decay
from adamfn.core.formulas import atan2_ratio
from adamfn.core.hyperparameters import scalar
from adamfn.formats import Moments
from adamfn.stages.bias import correction
from adamfn.stages.two_moments import from_moments


def scale_by_atan2_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    a: chex.Numeric = 1.27,
    b: chex.Numeric = 1.0,
    *,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""The angle between the average of the gradients and the root of their squares' average.

    With m and v as in `scale_by_moments`, and $c_i = 1 - b_i^t$:

    $$ u = a \operatorname{atan2}(m / c_1,\; b \sqrt{v / c_2}) $$

    It needs no eps: multiplied by any number, the gradients give the same updates, as far as their
    squares are numbers of the moments' dtype. An update is at most $a \pi / 2$; a of 1.27, which is
    about $4 / \pi$, makes it 1 where $m = \sqrt v$. The averages are corrected here, and no
    `bias_correct` belongs after it.

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      a: factor of the angle, at least 0.
      b: factor of the root, at least 0.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`; state and dtypes as in `scale_by_moments`. A complex m keeps its
      direction, and its size goes into the angle.

    Raises:
      TypeError, ValueError: as `scale_by_moments`.

    References:
      Everett et al., Scaling Exponents Across Parameterizations and Optimizers, 2024, section 4.3
      (arXiv 2407.05872), with the a and b of the packages that implement it; the decays are Adam's.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_atan2_moments()
    >>> updates, state = tx.update(jnp.array([3.0, -1e-9]), tx.init(jnp.zeros(2)))
    >>> print(updates.round(2))
    [ 1. -1.]
    """
    mean, square = decay("b1", b1), decay("b2", b2)
    a, b = scalar("a", a), scalar("b", b)
    return from_moments(
        "scale_by_atan2_moments",
        atan2_ratio,
        lambda count: (mean.shares, square.shares, correction(mean, square, count), a, b),
        moments,
    )
