"""What the stages of Adam's family share: two moments, their state, and the scalars of a count."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.stage import Stage, exported_state, real_zeros, zeros
from adamfn.formats import Moments
from adamfn.trees import PyTree


@exported_state
class ScaleByMomentsState(NamedTuple):
    """State of `scale_by_moments` and of its kin that keep two moments."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients: the parameters' tree and shapes, float32 at least; or the
    codes of a format, or None where a format has none of their shape."""
    nu: PyTree
    """The average v of their squares (of |g|^2 for a complex leaf): likewise, and real."""
    scales: PyTree
    """What formats need besides codes: an entry for each leaf in their order, or an empty tuple."""


def from_moments(
    name: str,
    formula: Callable[..., tuple[jax.Array, ...]],
    scalars: Callable[[jax.Array], Sequence[PyTree]],
    moments: Moments,
    *,
    more: Sequence[str] = (),
    state: type[Any] = ScaleByMomentsState,
    elementwise: bool = True,
) -> GradientTransformation:
    """The transformation of a stage that keeps two moments.

    Args:
      name: its own, for error messages.
      formula: `(g, mu, nu, *scalars) -> (u, mu, nu)`, a function of a module.
      scalars: the formula's, from the step's count (1 at the first).
      moments: how the moments are stored.
      more: fields of the state that are kept as nu is, which the formula is given after it.
      state: the state's type.
      elementwise: as in `Stage`.
    """
    return from_stage(
        Stage(
            name,
            formula,
            keeps={"mu": zeros, "nu": real_zeros} | dict.fromkeys(more, real_zeros),
            scalars=lambda count, state, extra: (scalars(count), {}),
            state=state,
            moments=moments,
            elementwise=elementwise,
        )
    )
