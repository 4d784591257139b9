"""`scale_by_lr`: the step size, with its sign."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import multiply
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled, value_at
from adamfn.core.stage import Scalars, Stage, exported_state


@exported_state
class ScaleByLrState(NamedTuple):
    """State of `scale_by_lr`."""

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
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its state remembers the
      rate it last used, unless that was given as an array, which is its giver's: under
      `optax.inject_hyperparams` it is in `state.hyperparams` alone.

    Raises:
      TypeError, ValueError: not a rate, at once or at `update`; at `update`, a state of
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

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        rate = extra.get("learning_rate")
        chosen = configured if rate is None else scheduled("learning_rate", rate)
        rate = value_at("learning_rate", chosen, count - 1)
        return (jnp.negative(rate),), {"learning_rate": rate}

    def first() -> jax.Array:
        return jnp.array(value_at("learning_rate", configured, jnp.zeros((), jnp.int32)), float)

    return from_stage(
        Stage(
            "scale_by_lr",
            multiply,
            scalars=scalars,
            start={"learning_rate": None if isinstance(configured, jax.Array) else first},
            state=ScaleByLrState,
            takes=("learning_rate",),
        )
    )
