"""AMSGrad: Adam whose denominator never shrinks."""

import chex

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.core.naming import explained
from adamfn.formats import Moments
from adamfn.stages.bias import bias_correct
from adamfn.stages.learning_rate import scale_by_lr
from adamfn.stages.maximum import scale_by_max_moments


@explained
def amsgrad(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""AMSGrad, by Reddi, Kale and Kumar: torch's `Adam(amsgrad=True)`.

    $$
    u = -\alpha \frac{m / (1 - b_1^t)}{\sqrt{v_\text{max} / (1 - b_2^t)} + \epsilon}, \qquad
    v_\text{max} \leftarrow \max(v_\text{max}, v)
    $$

    Args:
      learning_rate: as in `adam`.
      b1: as in `adam`.
      b2: as in `adam`.
      eps: as in `adam`.
      eps_root: added under the root, as in `scale_by_moments`.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`. The state takes 12 bytes a parameter.

    Raises:
      TypeError, ValueError: as `adam`.

    References:
      Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, 2018, algorithm 2
      (arXiv 1904.09237).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.amsgrad(learning_rate=0.1)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(params))
    >>> print(updates)
    [-0.1  0.1]
    """
    return chain(
        scale_by_max_moments(b1, b2, eps, eps_root=eps_root, moments=moments),
        bias_correct(b1, b2),
        scale_by_lr(learning_rate),
    )
