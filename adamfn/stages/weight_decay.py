"""`add_decayed_weights`: weight decay, decoupled or not by where it stands in the chain."""

from collections.abc import Callable

from adamfn.chaining import from_stage
from adamfn.formulas import add_agreeing_multiple, add_multiple
from adamfn.hyperparams import ScalarOrSchedule, scheduled, value_at
from adamfn.stage import Stage
from adamfn.transform import GradientTransformation
from adamfn.trees import PyTree


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    *,
    cautious: bool = False,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters to the updates.

    $$ u \leftarrow u + \lambda \theta $$

    Just before `scale_by_lr` it is AdamW's decoupled decay, which shrinks parameters by
    $\alpha\lambda$ a step; before `scale_by_moments` it is an L2 penalty, as in torch's
    `Adam(weight_decay=...)`.

    A cautious decay shrinks only what the update shrinks too, $u \leftarrow u + \lambda
    \mathbb 1(u \theta \ge 0)\, \theta$, element by element. It reads the update with its sign
    as a gradient has it, and so belongs before `scale_by_lr`.

    Args:
      weight_decay: a number at least 0, a scalar array, or a function of the number of steps
        taken so far, such as any optax schedule.
      mask: which parameters decay, None for all: a tree of bools of the parameters' structure or
        a prefix of it, or a function that makes one from the parameters, such as
        `adamfn.masks.matrices()`.
      cautious: whether to leave out what the update would make larger in size.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its `update` needs
      `params`.

    Raises:
      TypeError, ValueError: not a decay; at `update`, `params` missing or unlike the
        updates, a mask that does not fit, a state of another transformation.

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
    """
    configured = scheduled("weight_decay", weight_decay)
    return from_stage(
        Stage(
            "add_decayed_weights",
            add_agreeing_multiple if cautious else add_multiple,
            reads=("params",),
            scalars=lambda count, state, extra: (
                (value_at("weight_decay", configured, count - 1),),
                {},
            ),
            mask=mask,
        )
    )
