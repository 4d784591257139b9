"""`bias_correct`: what the averages of the first steps lack, made good."""

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import Decay, bias, decay
from adamfn.core.formulas import multiply
from adamfn.core.stage import Stage


def bias_correct(b1: chex.Numeric = 0.9, b2: chex.Numeric = 0.999) -> GradientTransformation:
    r"""Corrects a ratio of averages for having begun at zero.

    At step $t = 1, 2, \ldots$, with $c_i = 1 - b_i^t$:

    $$ u \leftarrow u \sqrt{c_2} / c_1 $$

    An average of a constant x that began at zero holds $c x$ after t steps. So m is too small by
    $c_1$ and $\sqrt v$ by $\sqrt{c_2}$. With `b2=0` only the numerator is corrected, with `b1=0`
    only the denominator.

    Args:
      b1: decay of the numerator's average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average in the denominator, likewise.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. $\sqrt{c_2} / c_1$ is
      right to 3e-7 from the first step on.

    Raises:
      TypeError, ValueError: a hyperparameter out of range; at `update`, a state of another
        transformation.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, section 3
      (arXiv 1412.6980).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.bias_correct(b1=0.9, b2=0.0)
    >>> mean = jnp.array([0.1])  # of a constant 1, after one step
    >>> updates, state = tx.update(mean, tx.init(mean))
    >>> print(updates.round(4))
    [1.]
    """
    mean, square = decay("b1", b1), decay("b2", b2)
    return from_stage(
        Stage(
            "bias_correct",
            multiply,
            scalars=lambda count, state, extra: ((correction(mean, square, count),), {}),
        )
    )


def correction(mean: Decay, square: Decay, count: jax.Array) -> jax.Array:
    """The factor of `bias_correct` at a step: sqrt(c2) / c1."""
    return jnp.sqrt(bias(square, count)) / bias(mean, count)
