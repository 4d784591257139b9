"""Lazy Adam: rows that got no gradient stay as they are, moments and all."""

import chex
import jax
import jax.numpy as jnp

from adamfn.averages import average_moments, scale_by_averages
from adamfn.bias import bias_correct
from adamfn.ema import Decay, decay
from adamfn.hyperparams import ScalarOrSchedule, scalar
from adamfn.learning_rate import scale_by_lr
from adamfn.storage import Moments
from adamfn.transform import GradientTransformation, chain


def scale_by_lazy_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of squares, in the rows that have any.

    A row is what the last axis spans: one embedding of a table of shape (tokens, features), the
    whole of a vector, a scalar by itself. With m and v as in `scale_by_moments`, where a row's
    gradient is not all zero

    $$ u = \frac{m}{\sqrt v + \epsilon} $$

    and where it is all zero, m and v stay and $u = 0$. The gradient is dense. The count, and with
    it `bias_correct(b1, b2)` after this, goes on for all rows alike. eps is in units of the
    uncorrected root, as in torch.

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`; state and dtypes as in `scale_by_moments`.

    Raises:
      TypeError, ValueError: as `scale_by_moments`.

    References:
      torch.optim.SparseAdam, whose sparse gradient names the rows that this one finds.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_lazy_moments(b1=0.0, b2=0.0)
    >>> table = jnp.ones((3, 2))
    >>> updates, state = tx.update(jnp.zeros((3, 2)).at[1].set(5.0), tx.init(table))
    >>> print(updates)
    [[0. 0.]
     [1. 1.]
     [0. 0.]]
    """
    mean, square, eps = decay("b1", b1), decay("b2", b2), scalar("eps", eps)
    return scale_by_averages(
        "scale_by_lazy_moments", _ratio, lambda _: (mean, square, eps), moments, rows_rest=True
    )


def _ratio(
    g: jax.Array, mu: jax.Array, nu: jax.Array, b1: Decay, b2: Decay, eps: jax.Array
) -> tuple[jax.Array, ...]:
    active = jnp.any(g != 0, axis=-1, keepdims=True) if g.ndim else g != 0
    next_mu, next_nu = average_moments(g, mu, nu, b1, b2)
    u = jnp.where(active, next_mu / (jnp.sqrt(next_nu) + eps), 0)
    return u, jnp.where(active, next_mu, mu), jnp.where(active, next_nu, nu)


def lazy_adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
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
        scale_by_lazy_moments(b1, b2, eps, moments=moments),
        bias_correct(b1, b2),
        scale_by_lr(learning_rate),
    )
