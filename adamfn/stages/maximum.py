"""`scale_by_max_moments`: a denominator that never shrinks."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import bias, decay
from adamfn.core.formulas import max_ratio
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import exported_state
from adamfn.formats import Moments
from adamfn.stages.two_moments import from_moments
from adamfn.trees import PyTree


@exported_state
class ScaleByMaxMomentsState(NamedTuple):
    """State of `scale_by_max_moments`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least."""
    nu: PyTree
    """The average v of their squares: likewise, and real."""
    nu_max: PyTree
    """The largest v so far: likewise, and real."""
    scales: PyTree
    """As in `ScaleByMomentsState`, those of `nu_max` last."""


def scale_by_max_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of the largest average of squares so far.

    With $c_2 = 1 - b_2^t$ at step $t = 1, 2, \ldots$, and m and v as in `scale_by_moments`:

    $$
    v_\text{max} \leftarrow \max(v_\text{max}, v), \qquad
    u = \frac{m}{\sqrt{v_\text{max} + c_2\,\epsilon_\text{root}} + \sqrt{c_2}\,\epsilon}
    $$

    The maximum is taken of the uncorrected v, as in torch and in the paper. (`optax.amsgrad` takes
    it of the corrected one, which the first gradients alone decide for a long time.)

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0, in units of the gradient.
      eps_root: added under the root, as in `scale_by_moments`.
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`; dtypes as in `scale_by_moments`. `bias_correct(b1, b2)` belongs
      after it.

    Raises:
      TypeError, ValueError: as `scale_by_moments`.

    References:
      Reddi, Kale and Kumar, On the Convergence of Adam and Beyond, 2018, algorithm 2
      (arXiv 1904.09237).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_max_moments(b1=0.0, b2=0.0)  # v is the last g^2
    >>> state = tx.init(jnp.zeros(1))
    >>> for g in (4.0, 1.0):
    ...     updates, state = tx.update(jnp.array([g]), state)
    >>> print(updates, state.nu, state.nu_max)
    [0.25] [1.] [16.]
    """
    mean, square = decay("b1", b1), decay("b2", b2)
    eps, eps_root = scalar("eps", eps), scalar("eps_root", eps_root)

    def scalars(count: jax.Array) -> tuple[PyTree, ...]:
        c2 = bias(square, count)
        return mean.shares, square.shares, jnp.sqrt(c2) * eps, c2 * eps_root

    return from_moments(
        "scale_by_max_moments",
        max_ratio,
        scalars,
        moments,
        more=("nu_max",),
        state=ScaleByMaxMomentsState,
    )
