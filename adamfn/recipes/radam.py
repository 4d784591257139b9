"""RAdam: Adam that trusts its denominator only once enough gradients are in it."""

import chex

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.core.naming import explained
from adamfn.formats import Moments
from adamfn.stages.bias import bias_correct
from adamfn.stages.learning_rate import scale_by_lr
from adamfn.stages.rectified import scale_by_rectified_moments


@explained
def radam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""RAdam, by Liu et al.: a warmup that the variance of the step asks for.

    With $\hat m$ as in `adam`, and $\rho$ and r as in `scale_by_rectified_moments`:

    $$
    u = -\alpha\, r\, \hat m \frac{\sqrt{1 - b_2^t}}{\sqrt v + \epsilon} \;\text{ if } \rho > 5,
    \qquad u = -\alpha\, \hat m \;\text{ otherwise}
    $$

    The first steps (five with b2 = 0.999) are those of plain momentum: their size is the
    gradient's.

    Args:
      learning_rate: as in `adam`.
      b1: as in `adam`.
      b2: as in `adam`; under 2/3 the second case holds for ever.
      eps: added to the uncorrected root, as in torch.
      eps_root: added under the root, as in `scale_by_moments`.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`. The state takes 8 bytes a parameter.

    Raises:
      TypeError, ValueError: as `adam`.

    References:
      Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020, algorithm 2
      (arXiv 1908.03265).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.radam(learning_rate=0.25)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(params))
    >>> print(updates.round(4))
    [-0.75  1.25]
    """
    return chain(
        scale_by_rectified_moments(b1, b2, eps, eps_root=eps_root, moments=moments),
        bias_correct(b1, b2),
        scale_by_lr(learning_rate),
    )
