"""A stage of an optimizer, as data.

A stage knows nothing of trees, formats, dtypes and devices: what an optimizer does with them is
derived from its stages, in `program` and `transform`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp

from adamfn.formats import Moments, check_moments
from adamfn.trees import PyTree, real_dtype, wide_dtype

Scalars: TypeAlias = tuple[Sequence[PyTree], Mapping[str, chex.Numeric]]
"""What a formula needs at a step besides arrays, and what the state remembers of the step."""


class EmptyState(NamedTuple):
    """State of a stage that keeps nothing."""


class CountedState(NamedTuple):
    """State of the first of some stages none of which counts the steps by itself."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    stage: PyTree
    """The stage's own state."""


def no_scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
    """The scalars of a stage that has none."""
    return (), {}


@dataclass(frozen=True)
class Stage:
    r"""One formula of an optimizer, and what it needs. `from_stage` makes a transformation of it.

    Attributes:
      name: what error messages call it.
      formula: the formula for one leaf, a function of a module:
        `(u, *reads, *keeps, *scalars) -> (u, *keeps)`, or `-> u` where it keeps nothing. Arrays
        come in float32 at least, and complex for complex leaves.
      reads: what it reads besides the updates u: `"params"`; `"grads"`, which the first of the
        stages joined with this one was given; `"mu"` and `"nu"`, as a stage before it, joined
        with it, keeps them after this step; `"noise"`, a random uint32 for each element; and
        `"stored"`, the parameter as it is stored, where `whole` makes another of it.
      keeps: what it keeps of each leaf, by the fields of its state, and the function of the
        parameter that makes the first of it, such as `jnp.zeros_like`.
      whole: a function of the stored parameter and what the stage keeps of it, that makes the
        parameter which all stages joined with this one read.
      scalars: a function `(count, state, extra) -> (scalars, remembered)` of the step's number (1
        at the first), the stage's state and the extra arguments of `update`. It returns the
        formula's scalars, numbers or scalar arrays or trees of them, and by field what the state
        remembers of this step besides.
      start: what the state remembers before the first step: by field, a function that makes it.
        None instead of one: nothing is remembered, and the state is an `EmptyState`.
      state: the type of its state, a `NamedTuple` whose fields are those of `keeps` and `start`,
        and any of `count` (the steps taken) and `scales` (what moments in a format need besides).
      moments: how `mu` and `nu`, the first two that it keeps, are stored.
      takes: the extra arguments of `update` that `scalars` looks at.
      measures: what `scalars` needs to know of all gradients: by name, a function of the list of
        them, such as their norm. `scalars` finds it among the extra arguments, where what `update`
        was given under that name wins.
      mask: which leaves it changes, as in `add_decayed_weights`; None for all.
      elementwise: whether an element of the results depends on no other element of the leaf.
      mean: of a formula that needs a mean over the whole leaf, what of: a function of a module that
        is given what the formula is, `(u, *reads, *keeps, *scalars) -> x`, each element by itself.
        The mean of x is the formula's last scalar. So a large leaf is measured in one pass, and
        takes its step in another. None for none.
      stacked: which leaves hold layers along their first axis, given like `mask`: the formula is
        given each layer by itself. None for none.
      holds: whether its one scalar says if the step is taken: where it is 0, the updates are 0, and
        the stages joined with this one keep and remember what they had, their counts too.
      rests: whether rows, along the last axis, rest where the stage is given nothing but zeros:
        their updates are 0, and what is kept of them stays as it is stored.

    Raises:
      TypeError, ValueError: these do not fit each other; names the stage.

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
    reads: Sequence[Literal["params", "grads", "mu", "nu", "noise", "stored"]] = ()
    keeps: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict[str, Any])
    whole: Callable[..., jax.Array] | None = None
    scalars: Callable[[jax.Array, Any, Mapping[str, Any]], Scalars] = no_scalars
    start: Mapping[str, Callable[[], jax.Array] | None] = field(default_factory=dict[str, Any])
    state: type[Any] = EmptyState
    moments: Moments = "float32"
    takes: Sequence[str] = ()
    measures: Mapping[str, Callable[[Sequence[Any]], jax.Array]] = field(
        default_factory=dict[str, Any]
    )
    mask: PyTree | Callable[[PyTree], PyTree] | None = None
    elementwise: bool = True
    mean: Callable[..., jax.Array] | None = None
    stacked: PyTree | Callable[[PyTree], PyTree] | None = None
    holds: bool = False
    rests: bool = False

    def __post_init__(self) -> None:
        """Checks that its parts fit each other."""
        for what in ("formula", "scalars"):
            if not callable(getattr(self, what)):
                raise TypeError(
                    f"Stage {self.name}: {what} is {getattr(self, what)!r}; expected a function."
                )
        if self.mean is not None and not callable(self.mean):
            raise TypeError(f"Stage {self.name}: mean is {self.mean!r}; expected a function.")
        for what in ("formula", "mean"):
            try:
                hash(getattr(self, what))
            except TypeError as error:
                raise TypeError(
                    f"Stage {self.name}: {what} is {getattr(self, what)!r}, which cannot be hashed;"
                    " expected a function of a module, as compiled programs are kept by it."
                ) from error
        for read in self.reads:
            if read not in ("params", "grads", "mu", "nu", "noise", "stored"):
                raise ValueError(
                    f"Stage {self.name}: reads has {read!r}; expected any of 'params', 'grads',"
                    " 'mu', 'nu', 'noise' and 'stored'."
                )
        if self.stacked is not None and self.elementwise and self.mean is None:
            raise ValueError(
                f"Stage {self.name}: stacked is given, and each element is taken by itself, layer"
                " or no; expected mean= or elementwise=False, or stacked left out."
            )
        fields = getattr(self.state, "_fields", None)
        if fields is None:
            raise TypeError(
                f"Stage {self.name}: state is {self.state!r}; expected a NamedTuple with a field"
                f" for each of {', '.join(self.keeps) or 'what it remembers'}."
            )
        expected = {*self.keeps, *self.start}
        found = {*fields} - {"count", "scales"}
        if expected != found:
            raise ValueError(
                f"Stage {self.name}: its state {self.state.__name__} has the fields"
                f" {', '.join(sorted(found)) or 'of nothing'}; expected"
                f" {', '.join(sorted(expected)) or 'none'}, one for each of `keeps` and `start`,"
                " and `count` and `scales` where they are wanted."
            )
        object.__setattr__(self, "moments", check_moments(self.moments))
        if self.moments != "float32" and not self.has_moments:
            raise ValueError(
                f"Stage {self.name}: moments is {self.moments!r}, and it keeps"
                f" {', '.join(self.keeps) or 'nothing'}; expected mu and nu, the first two that it"
                " keeps, and a field `scales` in its state."
            )

    @property
    def states(self) -> tuple[type[Any], ...]:
        """The types that its state may have."""
        return (self.state, EmptyState) if None in self.start.values() else (self.state,)

    @property
    def has_moments(self) -> bool:
        """Whether what it keeps can be stored in a format."""
        return tuple(self.keeps)[:2] == ("mu", "nu") and "scales" in self.state._fields


def zeros(leaf: Any) -> jax.Array:
    """Zeros where a leaf lies, of its shape, in float32 at least."""
    return jnp.zeros_like(leaf, wide_dtype(jnp.result_type(leaf)))


def real_zeros(leaf: Any) -> jax.Array:
    """Real zeros where a leaf lies, of its shape, in float32 at least."""
    return jnp.zeros_like(leaf, real_dtype(wide_dtype(jnp.result_type(leaf))))
