"""Lazy Adam: rows that got no gradient stay as they are, moments and all."""

import chex

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.core.naming import explained
from adamfn.formats import Moments
from adamfn.stages.bias import bias_correct
from adamfn.stages.lazy import scale_by_lazy_moments
from adamfn.stages.learning_rate import scale_by_lr


@explained
def lazy_adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Adam for embeddings: rows whose gradient is all zero keep parameters and moments.

    In the other rows, with $\hat m$ as in `adam`:

    $$ u = -\alpha\, \hat m \frac{\sqrt{1 - b_2^t}}{\sqrt v + \epsilon} $$

    It does what torch.optim.SparseAdam does. Adam itself goes on moving a row by its old momentum
    after its token was last seen, and forgets how large its gradients were.

    Args:
      learning_rate: as in `adam`.
      b1: as in `adam`.
      b2: as in `adam`.
      eps: added to the uncorrected root, as in torch.
      eps_root: added under the root, as in `scale_by_moments`.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`. The state takes 8 bytes a parameter. A weight decay chained after
      it moves all rows.

    Raises:
      TypeError, ValueError: as `adam`; a sparse gradient (`jax.experimental.sparse`) is none.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.lazy_adam(learning_rate=0.1)
    >>> table = jnp.ones((3, 2))
    >>> updates, state = tx.update(jnp.zeros((3, 2)).at[1].set(5.0), tx.init(table), table)
    >>> print(adamfn.apply_updates(table, updates))
    [[1.  1. ]
     [0.9 0.9]
     [1.  1. ]]
    """
    return chain(
        scale_by_lazy_moments(b1, b2, eps, eps_root=eps_root, moments=moments),
        bias_correct(b1, b2),
        scale_by_lr(learning_rate),
    )
