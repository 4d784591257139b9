"""Adamax: Adam with the largest gradient, slowly forgotten, as its denominator."""

import chex

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.core.naming import explained
from adamfn.formats import Moments
from adamfn.stages.bias import bias_correct
from adamfn.stages.infinity import scale_by_infinity_moments
from adamfn.stages.learning_rate import scale_by_lr


@explained
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
