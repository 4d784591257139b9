"""The two averages that every member of the family keeps, and the stage around its formula.

A member is a formula for one leaf, `(g, mu, nu, *scalars) -> (u, mu, nu)`, and the scalars that
it needs at a step. What is around it stands here, once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.ema import Decay, average, increment
from adamfn.state import check_state
from adamfn.storage import Moments, check_moments, step_moments, zero_moments
from adamfn.transform import GradientTransformation
from adamfn.trees import PyTree


class ScaleByMomentsState(NamedTuple):
    """State of `scale_by_moments` and of its kin that keep two moments."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least; or at
    each leaf what its format stores."""
    nu: PyTree
    """The average v of their squares (of |g|^2 for a complex leaf): likewise, and real."""


def average_moments(
    g: jax.Array, mu: jax.Array, nu: jax.Array, b1: Decay, b2: Decay
) -> tuple[jax.Array, jax.Array]:
    """One step of both averages of a leaf: of g, and of |g|^2."""
    return average(mu, g, b1), average(nu, jnp.real(g * jnp.conj(g)), b2)


def scale_by_averages(
    name: str,
    formula: Callable[..., tuple[jax.Array, ...]],
    scalars: Callable[[chex.Array], Sequence[PyTree]],
    moments: Moments,
    *,
    kept_as: type[Any] = ScaleByMomentsState,
    rows_rest: bool = False,
) -> GradientTransformation:
    """The transformation that applies a member's formula to every leaf.

    Args:
      name: the transformation's own, for error messages.
      formula: `(g, mu, nu, *scalars) -> (u, mu, nu)`, a function of a module.
      scalars: what the formula needs at a step, the same for all leaves, from its count (1 at the
        first).
      moments: how the moments are stored.
      kept_as: the state's type, with the fields of `ScaleByMomentsState`.
      rows_rest: whether rows whose moments the formula leaves as they are stay as they are stored.
    """
    check_moments(moments)

    def init(params: PyTree) -> PyTree:
        mu, nu = zero_moments(name, params, moments, rows_rest=rows_rest)
        return kept_as(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        state = check_state(name, state, kept_as)
        count = increment(state.count)
        kept = {"mu": state.mu, "nu": state.nu}
        updates, mu, nu = step_moments(
            name, formula, updates, kept, scalars(count), moments, count, rows_rest=rows_rest
        )
        return updates, kept_as(count, mu, nu)

    return GradientTransformation(init, update)
