"""`add_decayed_weights`: weight decay, decoupled or not by where it stands in the chain."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.contradictions import INDEPENDENT
from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import add_agreeing_multiple, add_multiple
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled, value_at
from adamfn.core.stage import Scalars, Stage
from adamfn.trees import PyTree


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    independent: bool = False,
    cautious: bool = False,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters to the updates.

    $$ u \leftarrow u + \lambda \theta $$

    Just before `scale_by_lr` it is AdamW's decoupled decay, which shrinks parameters by
    $\alpha\lambda$ a step; before `scale_by_moments` it is an L2 penalty, as in torch's
    `Adam(weight_decay=...)`. After `scale_by_lr` it would make parameters grow, and is refused.

    With `independent` it stands after `scale_by_lr`, whose rate then does not multiply it:

    $$ u \leftarrow u - \lambda \theta $$

    That is the decay of the paper, which only its schedule scales.

    A cautious decay shrinks only what the update shrinks too, $u \leftarrow u + \lambda
    \mathbb 1(u \theta \ge 0)\, \theta$, element by element. It reads the update with its sign
    as a gradient has it, and so belongs before `scale_by_lr`.

    Args:
      weight_decay: a number at least 0, a scalar array, or a function of the number of steps
        taken so far, such as any optax schedule.
      mask: which parameters decay, None for all: a tree of bools of the parameters' structure or
        a prefix of it, or a function that makes one from the parameters, such as
        `adamfn.masks.matrices()`.
      independent: whether the decay is independent of the rate.
      cautious: whether to leave out what the update would make larger in size.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its `update` needs
      `params`.

    Raises:
      TypeError, ValueError: not a decay; independent and cautious at once; at `update`, `params`
        missing or unlike the updates, a mask that does not fit, a state of another transformation.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2
      (arXiv 1711.05101). Chen et al., Cautious Weight Decay, 2025, algorithm 1 (arXiv 2510.12402);
      of complex numbers, which it does not treat, those agree whose angle is at most a right one.

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
    if independent and cautious:
        raise ValueError(
            "add_decayed_weights: both independent and cautious are True; expected one of them: a"
            " cautious decay compares signs, which the rate before an independent one turns around."
        )

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        rate = value_at("weight_decay", configured, count - 1)
        return (jnp.negative(rate) if independent else rate,), {}

    return from_stage(
        Stage(
            INDEPENDENT if independent else "add_decayed_weights",
            add_agreeing_multiple if cautious else add_multiple,
            reads=("params",),
            scalars=scalars,
            mask=mask,
        )
    )
