"""NAdam: Adam that looks one step ahead, with a momentum that warms up."""

import chex

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.core.naming import explained
from adamfn.formats import Moments
from adamfn.stages.bias import bias_correct
from adamfn.stages.learning_rate import scale_by_lr
from adamfn.stages.nesterov import scale_by_nesterov_moments


@explained
def nadam(
    learning_rate: ScalarOrSchedule = 2e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
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
      eps_root: added under the root, as in `scale_by_moments`.
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
        scale_by_nesterov_moments(
            b1, b2, eps, eps_root=eps_root, momentum_decay=momentum_decay, moments=moments
        ),
        bias_correct(0.0, b2),
        scale_by_lr(learning_rate),
    )
