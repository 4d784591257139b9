# SPDX-License-Identifier: Apache-2.0
"""The learning rate, and weight decay: decoupled or not, independent, cautious or corrected."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.contradictions import INDEPENDENT
from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import add_agreeing_multiple, add_multiple, multiply
from adamfn.core.hyperparameters import ScalarOrSchedule, scalar, scheduled, value_at
from adamfn.core.masks import Mask
from adamfn.core.stage import Scalars, Stage, exported_state
from adamfn.trees import Numeric, as_array


@exported_state
class ScaleByLrState(NamedTuple):
    """State of `scale_by_lr`."""

    learning_rate: jax.Array
    """The rate of the last step, to be logged; before the first step, the rate of that one. Another
    value, set with `optax.tree.set(state, learning_rate=x)`, is the rate from then on."""
    written: jax.Array
    """The rate as it was written last: where `learning_rate` differs from it, it has been set."""


def scale_by_lr(learning_rate: ScalarOrSchedule = 1e-3) -> GradientTransformation:
    r"""Multiplies updates by minus the learning rate.

    $$ u \leftarrow -\alpha u $$

    The rate is a number at least 0, a scalar array, or a function of the number of steps taken so
    far (0 at the first), such as any optax schedule. `update(..., learning_rate=x)` takes x for
    this step instead. If x is an argument of a jitted function, a new x compiles nothing.

    The state holds the rate that was used last. `optax.tree.set(state, learning_rate=x)` sets it:
    x is the rate from then on, in checkpoints too, until it is set to `state.written`, or for one
    step given to `update`. A rate that was not set does not outlive its transformation: a state
    that is restored into one with another rate goes on with the new rate. If the rate is an array,
    its caller has it, and the state has none: under `optax.inject_hyperparams` it is in
    `state.hyperparams` alone.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_lr(lambda count: 0.5 / (1 + count))
    >>> updates = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(updates, tx.init(updates))
    >>> updates, state = tx.update(updates, state, learning_rate=0.125)
    >>> print(updates, state.learning_rate)
    [-0.125 -0.25 ] 0.125
    """
    configured = scheduled("learning_rate", learning_rate)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        rate = written = rate_at(configured, count, extra)
        if "written" in state._fields and extra.get("learning_rate") is None:
            now, was = as_array(state.learning_rate), jnp.asarray(state.written)
            now = jnp.asarray(scalar("the state's learning_rate", now, narrow=True), was.dtype)
            stays = (now == was) | (jnp.isnan(now) & jnp.isnan(was))
            rate, now, was = (jnp.asarray(x, float) for x in (rate, now, was))
            rate, written = jnp.where(stays, rate, now), jnp.where(stays, rate, was)
        return (jnp.negative(rate),), {"learning_rate": rate, "written": written}

    def first() -> jax.Array:
        return jnp.array(value_at("learning_rate", configured, jnp.zeros((), jnp.int32)), float)

    begin = None if isinstance(configured, jax.Array) else first
    start, takes = {"learning_rate": begin, "written": begin}, ("learning_rate",)
    name, state = "scale_by_lr", ScaleByLrState
    return from_stage(Stage(name, multiply, scalars=scalars, start=start, state=state, takes=takes))


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    independent: bool = False,
    cautious: bool = False,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters to the updates.

    $$ u \leftarrow u + \lambda \theta $$

    Just before `scale_by_lr` it is AdamW's decoupled decay, which shrinks parameters by
    $\alpha\lambda$ a step. Before `scale_by_moments` it is an L2 penalty, as in torch's
    `Adam(weight_decay=...)`. After `scale_by_lr` it would make parameters grow, and is refused
    (under `optax.chain` it cannot see the rate: use `adamfn.chain`). Sources: Loshchilov and
    Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2 (arXiv 1711.05101); Chen et
    al., Cautious Weight Decay, 2025, algorithm 1 (arXiv 2510.12402).

    Args:
      weight_decay: $\lambda$, given like the rate of `scale_by_lr`.
      mask: which parameters decay, None for all: a tree of bools of the parameters' structure or a
        prefix of it, or a function of the parameters that makes one: `adamfn.masks.matrices()`.
      independent: decay by $u \leftarrow u - \lambda \theta$ after `scale_by_lr`, so that no rate
        multiplies it: the first paper's decay, which only its schedule scales.
      cautious: decay by $u \leftarrow u + \lambda \mathbb 1(u \theta \ge 0)\, \theta$: only the
        elements that the update shrinks too. It stands before `scale_by_lr`, which turns the signs
        that it compares. Complex numbers agree if their angle is at most a right one.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.add_decayed_weights(0.5, mask=lambda p: {"w": True, "b": False})
    >>> params = {"w": jnp.array([2.0]), "b": jnp.array([2.0])}
    >>> updates, state = tx.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, tx.init(params), params)
    >>> print(updates["w"], updates["b"])
    [1.] [0.]
    """
    configured = scheduled("weight_decay", weight_decay)
    if independent and cautious:
        raise ValueError(
            "add_decayed_weights: both independent and cautious are True; expected one of them: a"
            " cautious decay compares signs, which the rate before an independent one turns around."
        )

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        rate = value_at("weight_decay", configured, count - 1)
        return (jnp.negative(rate) if independent else rate,), {}

    name = INDEPENDENT if independent else "add_decayed_weights"
    formula = add_agreeing_multiple if cautious else add_multiple
    return from_stage(Stage(name, formula, reads=("params",), scalars=scalars, mask=mask))


def add_corrected_decay(
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    peak: Numeric,
    mask: Mask = None,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters that falls with the learning rate: AdamC's decay.

    With the rate $\alpha_t$ of this step and the largest of the run:

    $$ u \leftarrow u + \lambda \frac{\alpha_t}{\alpha_\text{max}} \theta $$

    Before `scale_by_lr` it shrinks parameters by $\lambda \alpha_t^2 / \alpha_\text{max}$ a step.
    So the size at which update and decay balance, with AdamW $\sqrt{\alpha / \lambda}$, stays as
    the rate falls. weight_decay and mask are as in `add_decayed_weights`, the rate is that of
    `scale_by_lr` (`update(..., learning_rate=x)` wins over both; a rate set in the state is
    `scale_by_lr`'s alone), and the peak, $\alpha_\text{max}$, is above 0. In the paper the weights
    of normalized layers decay so, and an output layer as in AdamW: give an `add_decayed_weights`
    the opposite mask. Source: Defazio, Why Gradients Rapidly Increase Near the End of Training,
    2025, algorithm 2 (arXiv 2506.02285). timm decays all parameters so.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.add_corrected_decay(0.5, lambda count: 0.1 / (1 + count), peak=0.1)
    >>> params, state = jnp.array([2.0]), tx.init(jnp.zeros(1))
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.zeros(1), state, params)
    >>> print(updates)  # half of the first step's
    [0.5]
    """
    decay, rate = scheduled("weight_decay", weight_decay), scheduled("learning_rate", learning_rate)
    peak = scalar("peak", peak)
    if isinstance(peak, float) and not peak:
        raise ValueError("peak is 0; expected the largest rate of the schedule, above 0.")

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        share = rate_at(rate, count, extra) / peak
        return (value_at("weight_decay", decay, count - 1) * share,), {}

    name, takes = "add_corrected_decay", ("learning_rate",)
    stage = Stage(name, add_multiple, ("params",), scalars=scalars, takes=takes, mask=mask)
    return from_stage(stage)


def rate_at(configured: ScalarOrSchedule, count: jax.Array, extra: Mapping[str, Any]) -> Numeric:
    """The rate of a step: the extra argument `learning_rate`, or else the configured one."""
    given = extra.get("learning_rate")
    chosen = configured if given is None else scheduled("learning_rate", given)
    return value_at("learning_rate", chosen, count - 1)
