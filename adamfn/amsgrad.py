"""AMSGrad: Adam whose denominator never shrinks."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.averages import average_moments
from adamfn.bias import bias_correct
from adamfn.ema import Decay, bias, decay, increment
from adamfn.hyperparams import ScalarOrSchedule, scalar
from adamfn.learning_rate import scale_by_lr
from adamfn.state import check_state
from adamfn.storage import Moments, check_moments, step_moments, zero_moments
from adamfn.transform import GradientTransformation, chain
from adamfn.trees import PyTree


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


def scale_by_max_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of the largest average of squares so far.

    With $c_2 = 1 - b_2^t$ at step $t = 1, 2, \ldots$, and m and v as in `scale_by_moments`:

    $$
    v_\text{max} \leftarrow \max(v_\text{max}, v), \qquad
    u = \frac{m}{\sqrt{v_\text{max}} + \sqrt{c_2}\,\epsilon}
    $$

    The maximum is taken of the uncorrected v, as in torch and in the paper. (`optax.amsgrad` takes
    it of the corrected one, which the first gradients alone decide for a long time.)

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0, in units of the gradient.
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
    check_moments(moments)
    mean, square, eps = decay("b1", b1), decay("b2", b2), scalar("eps", eps)

    def init(params: PyTree) -> ScaleByMaxMomentsState:
        mu, nu = zero_moments("scale_by_max_moments", params, moments)
        return ScaleByMaxMomentsState(
            jnp.zeros((), jnp.int32), mu, nu, jax.tree.map(jnp.zeros_like, nu)
        )

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, ScaleByMaxMomentsState]:
        state = check_state("scale_by_max_moments", state, ScaleByMaxMomentsState)
        count = increment(state.count)
        updates, *kept = step_moments(
            "scale_by_max_moments",
            _ratio,
            updates,
            {"mu": state.mu, "nu": state.nu, "nu_max": state.nu_max},
            (mean, square, jnp.sqrt(bias(square, count)) * eps),
            moments,
            count,
        )
        return updates, ScaleByMaxMomentsState(count, *kept)

    return GradientTransformation(init, update)


def _ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    nu_max: jax.Array,
    b1: Decay,
    b2: Decay,
    eps: jax.Array,
) -> tuple[jax.Array, ...]:
    mu, nu = average_moments(g, mu, nu, b1, b2)
    nu_max = jnp.maximum(nu_max, nu)
    return mu / (jnp.sqrt(nu_max) + eps), mu, nu, nu_max


def amsgrad(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
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
        scale_by_max_moments(b1, b2, eps, moments=moments),
        bias_correct(b1, b2),
        scale_by_lr(learning_rate),
    )
