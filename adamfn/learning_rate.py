"""`scale_by_lr`: the step size, with its sign."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from adamfn.ema import increment
from adamfn.hyperparams import ScalarOrSchedule, scheduled, value_at
from adamfn.scaling import scale_leaves
from adamfn.state import check_state
from adamfn.transform import GradientTransformation
from adamfn.trees import PyTree


class ScaleByLrState(NamedTuple):
    """State of `scale_by_lr`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    learning_rate: chex.Array
    """The rate of the last step, to be logged (before the first: of the first to come)."""


def scale_by_lr(learning_rate: ScalarOrSchedule = 1e-3) -> GradientTransformation:
    r"""Multiplies updates by minus the learning rate.

    $$ u \leftarrow -\alpha u $$

    The minus sign makes them updates to add to the parameters. `update(..., learning_rate=x)`
    takes x for this step instead, a number, a scalar array or a function of the count. Where
    `update` is jitted and x an argument of the jitted function, a new x compiles nothing.

    Args:
      learning_rate: a number at least 0, a scalar array, or a function of the number of steps
        taken so far (0 at the first), such as any optax schedule.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its state's
      `learning_rate` is the rate it last used.

    Raises:
      TypeError, ValueError: a rate that is none, at once or at `update`; at `update`, a state of
        another transformation.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.scale_by_lr(lambda count: 0.5 / (1 + count))
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(params, tx.init(params))
    >>> print(updates)
    [-0.5 -1. ]
    >>> updates, state = tx.update(params, state, learning_rate=0.125)
    >>> print(updates, state.learning_rate)
    [-0.125 -0.25 ] 0.125
    """
    configured = scheduled("learning_rate", learning_rate)

    def init(params: PyTree) -> ScaleByLrState:
        count = jnp.zeros((), jnp.int32)
        return ScaleByLrState(
            count, jnp.asarray(value_at("learning_rate", configured, count), float)
        )

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        learning_rate: ScalarOrSchedule | None = None,
        **extra: Any,
    ) -> tuple[PyTree, ScaleByLrState]:
        state = check_state("scale_by_lr", state, ScaleByLrState)
        chosen = configured if learning_rate is None else scheduled("learning_rate", learning_rate)
        rate = value_at("learning_rate", chosen, state.count)
        updates = scale_leaves("scale_by_lr", updates, jnp.negative(rate))
        return updates, ScaleByLrState(increment(state.count), jnp.asarray(rate, float))

    return GradientTransformation(init, update)
