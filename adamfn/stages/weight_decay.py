"""`add_decayed_weights`: weight decay, decoupled or not by where it stands in the chain."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.chaining import from_stage
from adamfn.formulas import add_multiple
from adamfn.hyperparams import ScalarOrSchedule, scheduled, value_at
from adamfn.stage import Scalars, Stage
from adamfn.transform import GradientTransformation
from adamfn.trees import PyTree

INDEPENDENT = "add_decayed_weights(independent=True)"
"""The name of the stage whose decay is independent of the rate."""

_GROWS = (
    "added to updates that have their sign already, a decay makes parameters grow. Put it before"
    " the rate, as adamw does, or pass independent=True for a decay that no rate multiplies."
)


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    independent: bool = False,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters to the updates.

    $$ u \leftarrow u + \lambda \theta $$

    Just before `scale_by_lr` it is AdamW's decoupled decay, which shrinks parameters by
    $\alpha\lambda$ a step; before `scale_by_moments` it is an L2 penalty, as in torch's
    `Adam(weight_decay=...)`. After `scale_by_lr` it would make parameters grow, and is refused.

    With `independent` it stands after `scale_by_lr`, whose rate then does not multiply it:

    $$ u \leftarrow u - \lambda \theta $$

    That is the decay of the paper, which only its schedule scales.

    Args:
      weight_decay: a number at least 0, a scalar array, or a function of the number of steps
        taken so far, such as any optax schedule.
      mask: which parameters decay, None for all: a tree of bools of the parameters' structure or
        a prefix of it, or a function that makes one from the parameters.
      independent: whether the decay is independent of the rate.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its `update` needs
      `params`.

    Raises:
      TypeError, ValueError: not a decay; at `update`, `params` missing or unlike the
        updates, a mask that does not fit, a state of another transformation.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2
      (arXiv 1711.05101).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.add_decayed_weights(0.5, mask=lambda p: {"w": True, "b": False})
    >>> params = {"w": jnp.array([2.0]), "b": jnp.array([2.0])}
    >>> updates, state = tx.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, tx.init(params), params)
    >>> print(updates["w"], updates["b"])
    [1.] [0.]
    >>> tx = adamfn.chain(adamfn.adam(1e-3), adamfn.add_decayed_weights(1e-4, independent=True))
    """
    configured = scheduled("weight_decay", weight_decay)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        rate = value_at("weight_decay", configured, count - 1)
        return (jnp.negative(rate) if independent else rate,), {}

    grows = not independent and (not isinstance(configured, float) or configured > 0)
    return from_stage(
        Stage(
            INDEPENDENT if independent else "add_decayed_weights",
            add_multiple,
            reads=("params",),
            scalars=scalars,
            mask=mask,
            refuses={"scale_by_lr": _GROWS} if grows else {},
        )
    )
