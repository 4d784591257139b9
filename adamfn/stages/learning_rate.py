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
    """The rate of the last step, to be logged; before the first step, the rate of that one."""


def scale_by_lr(learning_rate: ScalarOrSchedule = 1e-3) -> GradientTransformation:
    r"""Multiplies updates by minus the learning rate.

    $$ u \leftarrow -\alpha u $$

    With the minus sign they can be added to the parameters. The rate is a number at least 0, a
    scalar array, or a function of the number of steps taken so far (0 at the first), such as any
    optax schedule. `update(..., learning_rate=x)` takes x for this step instead. If x is an
    argument of a jitted function, a new x compiles nothing.

    The state holds the rate that was used last. It does not if the rate is an array, which its
    caller has: under `optax.inject_hyperparams` it is in `state.hyperparams` alone.

    >>> import adamfn, jax.numpy as jnp
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
        rate = rate_at(configured, count, extra)
        return (jnp.negative(rate),), {"learning_rate": rate}

    def first() -> jax.Array:
        return jnp.array(value_at("learning_rate", configured, jnp.zeros((), jnp.int32)), float)

    start = {"learning_rate": None if isinstance(configured, jax.Array) else first}
    state, takes = ScaleByLrState, ("learning_rate",)
    stage = Stage("scale_by_lr", multiply, scalars=scalars, start=start, state=state, takes=takes)
    return from_stage(stage)


def rate_at(
    configured: ScalarOrSchedule, count: jax.Array, extra: Mapping[str, Any]
) -> chex.Numeric:
    """The rate of a step: the extra argument `learning_rate`, or else the configured one."""
    given = extra.get("learning_rate")
    chosen = configured if given is None else scheduled("learning_rate", given)
    return value_at("learning_rate", chosen, count - 1)
