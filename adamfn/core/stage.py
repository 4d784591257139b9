# SPDX-License-Identifier: Apache-2.0
"""A stage of an optimizer, as data.

Its formula sees one leaf, as arrays in float32 at least. Trees, storage and devices are the
business of `chains`, which derives `init`, `update` and `step` from stages.
"""

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp

from adamfn.core.averages import Decays
from adamfn.core.hyperparameters import check_seed
from adamfn.formats import Moments, check_moments
from adamfn.formats.format import has_hash
from adamfn.trees import Numeric, PyTree, exported, real_dtype, shown, wide_dtype

Scalars: TypeAlias = tuple[Sequence[PyTree], Mapping[str, Numeric]]
"""The scalars of a formula at one step, and the values that the state remembers of that step."""

_READS = ("params", "new_params", "grads", "mu", "nu", "noise")
_SPECIAL = {"count", "scales"}

T = TypeVar("T", bound=type[Any])


@cache
def counted(state: type[Any]) -> type[Any]:
    """The same named tuple with a field `count`, the steps taken, before its other fields."""
    made: Any = namedtuple(f"Counted{state.__name__}", ("count", *cast("Any", state)._fields))  # pyright: ignore[reportUntypedNamedTuple]
    made.__doc__ = f"{state.__name__} of a stage that counts the steps itself."
    made.__reduce__ = lambda self: (_recounted, (state, *self))
    return made


def _recounted(state: type[Any], *values: Any) -> Any:
    return counted(state)(*values)


def exported_state(state: T) -> T:
    """Tells `jax.export` of a state's type, with and without a count. A decorator."""
    if "count" not in state._fields:
        exported(counted(state))
    return exported(state)


@exported_state
class EmptyState(NamedTuple):
    """State of a stage that keeps nothing."""


def no_scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
    """The scalars of a stage that has none."""
    return (), {}


@dataclass(frozen=True, eq=False)
class Stage:
    r"""One formula of an optimizer, and what it needs. `from_stage` makes a transformation of it.

    Attributes:
      name: used in error messages.
      formula: the formula for one leaf, a function of a module:
        `(u, *reads, *keeps, *scalars) -> (u, *keeps)`, or `-> u` if it keeps nothing. Arrays
        are float32 at least, and complex for complex leaves.
      reads: arrays that it needs besides the updates u: `"params"`; `"new_params"`, the
        parameters after this step, for the last stage of a chain; `"grads"`, the gradient as the
        stage of moments before it was given it (or as it entered the run, if the stages before it
        keep other averages); `"mu"` and `"nu"`, the moments after this step; `"noise"`, a random
        uint32 for each element.
      keeps: arrays that it keeps of each leaf: by field of its state, a function of the parameter
        that makes the first one, such as `jnp.zeros_like`.
      scalars: a function `(count, state, extra) -> (scalars, remembered)` of the step (1 at the
        first), the stage's state and the extra arguments of `update`. It returns the formula's
        scalars (numbers, scalar arrays, or trees of them), and the new values of the fields in
        `start`.
      start: values that the state remembers between steps: by field, a function that makes the
        first one. With None in place of a function the state is an `EmptyState`.
      state: the type of its state, a `NamedTuple` with the fields of `keeps` and `start`. Three
        fields are special. `count` counts the steps. `scales` holds the scales of moments in a
        format. `taken`, if it is in `start`, is a gate: a bool; where it is False the step is
        skipped. Updates are then 0, and the other stages of the run keep their states.
      moments: how `mu` and `nu`, the first two of `keeps`, are stored.
      takes: the extra arguments of `update` that `scalars` reads. `"grads"` is no argument of
        `update`: it is the list of all gradients, from which a norm can be computed.
      mask: which leaves it changes, as in `add_decayed_weights`; None for all.
      decays: b1 and b2 of the moments that it keeps, as `bias_correct` after it is to correct them;
        None if they are not known. It finds them in `extra["decays"]`, as any later stage.
      elementwise: True if each output element depends only on the matching input elements. A
        formula that needs a statistic of its leaf, such as a mean, sets it to False. It is a
        segment by itself: XLA applies it to the update in memory, between two fused segments.
      seed: of its noise, as in `scale_by_moments`. Fused stages share theirs: their seeds add up.

    Raises:
      TypeError, ValueError: the parts do not fit each other; names the stage.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> def halve(u):
    ...     return u / 2
    >>> tx = adamfn.from_stage(adamfn.Stage("halve", halve))
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(params, tx.init(params))
    >>> print(updates)
    [0.5 1. ]
    """

    name: str
    formula: Callable[..., Any]
    reads: Sequence[Literal["params", "new_params", "grads", "mu", "nu", "noise"]] = ()
    keeps: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict[str, Any])
    scalars: Callable[[jax.Array, Any, Mapping[str, Any]], Scalars] = no_scalars
    start: Mapping[str, Callable[[], jax.Array] | None] = field(default_factory=dict[str, Any])
    state: type[Any] = EmptyState
    moments: Moments = "float32"
    takes: Sequence[str] = ()
    mask: PyTree | Callable[[PyTree], PyTree] | None = None
    elementwise: bool = True
    seed: Numeric | None = None
    decays: Decays | None = None

    def __post_init__(self) -> None:
        """Checks that its parts fit each other."""
        check_seed(self.seed)
        b1 = 0.0 if self.decays is None else 1 - self.decays[0].complement
        object.__setattr__(self, "moments", check_moments(self.moments, b1))
        fields: Any = getattr(self.state, "_fields", None)
        expected, found = {*self.keeps, *self.start}, {*(fields or ())} - _SPECIAL
        stores = self.moments == "float32" or (fields and self.has_moments)
        names = ", ".join(sorted(expected)) or "none"
        for part, fits, wanted in (
            ("formula", callable(self.formula), "a function"),
            ("formula", has_hash(self.formula), "one that can be hashed: a function of a module"),
            ("scalars", callable(self.scalars), "a function"),
            ("reads", {*self.reads} <= {*_READS}, f"any of {', '.join(map(repr, _READS))}"),
            ("state", fields is not None, f"a NamedTuple with the fields {names}"),
            ("state", found == expected, f"the fields {names}, those of `keeps` and `start`"),
            ("moments", stores, "'float32', or mu and nu in `keeps`, and `scales` in the state"),
        ):
            if not fits:
                mistyped = fields is None or part in ("formula", "scalars")
                raise (TypeError if mistyped else ValueError)(
                    f"Stage {self.name}: {part} is {shown(getattr(self, part))}; expected {wanted}."
                )

    @property
    def counts(self) -> bool:
        """Whether its state counts the steps wherever the stage stands."""
        return "count" in self.state._fields

    @property
    def states(self) -> tuple[type[Any], ...]:
        """The types that its state may have."""
        kinds = [self.state, EmptyState] if None in self.start.values() else [self.state]
        return (*kinds, *(counted(kind) for kind in kinds if "count" not in kind._fields))

    @property
    def has_moments(self) -> bool:
        """Whether the arrays that it keeps can be stored in a format."""
        return tuple(self.keeps)[:2] == ("mu", "nu") and "scales" in self.state._fields


def zeros(leaf: Any) -> jax.Array:
    """Zeros of a leaf's shape and placement, in float32 at least."""
    return jnp.zeros_like(leaf, wide_dtype(jnp.result_type(leaf)))


def real_zeros(leaf: Any) -> jax.Array:
    """Real zeros of a leaf's shape and placement, in float32 at least."""
    return jnp.zeros_like(leaf, real_dtype(wide_dtype(jnp.result_type(leaf))))
