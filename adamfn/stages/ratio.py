"""`scale_by_moments`: two averages and their ratio."""

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import bias, decay, increment
from adamfn.core.formulas import ratio
from adamfn.core.hyperparameters import scalar
from adamfn.formats import Moments
from adamfn.stages.two_moments import from_moments
from adamfn.trees import PyTree


def scale_by_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    nesterov: bool = False,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of the average of their squares.

    With $c_2 = 1 - b_2^t$ at step $t = 1, 2, \ldots$:

    $$
    m \leftarrow m + (1 - b_1)(g - m), \qquad v \leftarrow v + (1 - b_2)(|g|^2 - v), \qquad
    u = \frac{m}{\sqrt{v + c_2\,\epsilon_\text{root}} + \sqrt{c_2}\,\epsilon}
    $$

    Both averages begin at zero and are not corrected for it here: `bias_correct` multiplies u by
    $\sqrt{c_2} / c_1$. Because eps is in units of the *corrected* second moment, which is why it
    meets $\sqrt{c_2}$ here, the two stages together give $\hat m / (\sqrt{\hat v} + \epsilon)$
    exactly.

    With `nesterov`, m in the ratio becomes $b_1 m\, c_1(t) / c_1(t + 1) + (1 - b_1) g$.

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0, in units of the gradient.
      eps_root: added under the root, at least 0, in units of the gradient's square. Not 0, it
        makes the derivative of an update at a zero gradient finite.
      nesterov: look one step ahead, in Dozat's form.
      moments: how the moments are stored: `"float32"`, `"bfloat16"`, `"8bit"`, `"4bit"`,
        `"factored"`, `"blockmean"`, a format of `adamfn.formats`, or a function that chooses one
        from a leaf's path and the leaf.

    Returns:
      A `GradientTransformation`. Updates have the gradients' shapes and dtypes; the moments are
      kept in float32, or float64 for float64 leaves, and mu is complex for complex leaves; a
      leaf that its format cannot hold is kept so too (`adamfn.formats.describe` shows it).

    Raises:
      TypeError, ValueError: a hyperparameter out of range; at `init`, a leaf that is not of
        floating point; at `update`, gradients or a state that do not fit, each by name.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1
      (arXiv 1412.6980); Dozat, Incorporating Nesterov Momentum into Adam, 2016, algorithm 2.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_moments(b1=0.5, b2=0.75)
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(jnp.array([0.5, -4.0]), tx.init(params))
    >>> print(updates)  # 0.5 g / sqrt(0.25 g^2), whatever the gradient's size
    [ 1. -1.]
    """
    mean, square = decay("b1", b1), decay("b2", b2)
    eps, eps_root = scalar("eps", eps), scalar("eps_root", eps_root)

    def scalars(count: jax.Array) -> tuple[PyTree, ...]:
        c2 = bias(square, count)
        ahead = bias(mean, count) / bias(mean, increment(count)) if nesterov else None
        return mean.shares, square.shares, jnp.sqrt(c2) * eps, c2 * eps_root, ahead

    return from_moments("scale_by_moments", ratio, scalars, moments)
