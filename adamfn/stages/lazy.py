"""`scale_by_lazy_moments`: rows that got no gradient stay as they are, moments and all."""

from typing import Any

import chex

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import bias, decay
from adamfn.core.formulas import lazy_ratio
from adamfn.core.hyperparameters import scalar
from adamfn.formats import Moments, check_moments, get
from adamfn.formats.format import answer
from adamfn.stages.two_moments import from_moments


def scale_by_lazy_moments(
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of squares, in the rows that have any.

    A row is what the last axis spans: one embedding of a table of shape (tokens, features), the
    whole of a vector, a scalar by itself. With m and v as in `scale_by_moments`, where a row's
    gradient is not all zero

    $$ u = \frac{m}{\sqrt{v + c_2\,\epsilon_\text{root}} + \epsilon}, \qquad c_2 = 1 - b_2^t $$

    and where it is all zero, m and v stay and $u = 0$. The gradient is dense. The count, and with
    it `bias_correct(b1, b2)` after this, goes on for all rows alike. eps is in units of the
    uncorrected root, as in torch.

    Args:
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0.
      eps_root: added under the root, as in `scale_by_moments`.
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
    mean, square = decay("b1", b1), decay("b2", b2)
    eps, eps_root = scalar("eps", eps), scalar("eps_root", eps_root)
    return from_moments(
        "scale_by_lazy_moments",
        lazy_ratio,
        lambda count: (mean.shares, square.shares, eps, bias(square, count) * eps_root),
        _stored_by_rows(moments),
        elementwise=False,
    )


def _stored_by_rows(moments: Moments) -> Moments:
    """The formats, if each row of a leaf can keep its moments in them; refused at `init` if not."""
    moments = check_moments(moments)
    if not callable(moments) and answer(get(moments), "stores_rows"):
        return moments

    def choose(path: str, leaf: Any) -> Any:
        format = get(moments(path, leaf) if callable(moments) else moments)
        if format.holds(leaf.shape, leaf.dtype) and not answer(format, "stores_rows"):
            raise ValueError(
                f"scale_by_lazy_moments: the format of the leaf at {path or 'the root'} stores"
                " several rows in one number; expected one in which a row can keep its moments,"
                " such as 'bfloat16' or '8bit'."
            )
        return format

    return choose
