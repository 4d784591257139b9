"""Gradient transformations, how they chain, and how their result is applied.

Nothing here knows of Adam.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast

import chex
import jax

from adamfn.rounding import add_stochastically
from adamfn.trees import PyTree, map_leaves


class UpdateFunction(Protocol):
    """The type of `GradientTransformation.update`."""

    def __call__(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Returns the transformed updates and the next state."""
        ...


class GradientTransformation(NamedTuple):
    """A pair of pure functions that turn gradients into updates.

    `init(params)` makes the state; `update(updates, state, params=None, **extra)` returns the
    transformed updates, with the structure, shapes and dtypes of what came in, and the next state.
    Extra arguments that a transformation does not know are ignored.

    Optax accepts it wherever it accepts its own, and the reverse. Only `optax.chain` drops the
    extra arguments of what is not its own class: `optax.GradientTransformationExtraArgs(*tx)`
    gives it that class.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> def update(updates, state, params=None, **extra):
    ...     return updates * 2, state
    >>> double = adamfn.GradientTransformation(init=lambda params: (), update=update)
    >>> updates, state = double.update(jnp.array([1.0]), double.init(jnp.array([0.0])))
    >>> print(updates)
    [2.]
    """

    init: Callable[[PyTree], PyTree]
    update: UpdateFunction


class Transformation(Protocol):
    """What can be chained: ours, optax's, or any object with these two methods."""

    @property
    def init(self) -> Callable[..., Any]:
        """Makes the state from the parameters."""
        ...

    @property
    def update(self) -> Callable[..., Any]:
        """Turns updates and state into the next updates and state."""
        ...


def chain(*transformations: Transformation) -> GradientTransformation:
    """Applies transformations one after another: `chain(f, g)` maps updates `u` to `g(f(u))`.

    The state is the tuple of their states. Every extra argument of `update`, such as
    `learning_rate=`, goes to each transformation that takes it.

    Args:
      *transformations: ours and optax's, in any mixture; none at all gives the identity.

    Returns:
      A `GradientTransformation`.

    Raises:
      TypeError: an argument has no `init` and `update`.
      ValueError: at `update`, the state has another number of parts than the chain.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.scale_by_lr(0.5), adamfn.scale_by_lr(0.5))
    >>> params = jnp.array([1.0, 2.0])
    >>> updates, state = tx.update(params, tx.init(params))
    >>> print(updates)
    [0.25 0.5 ]
    """
    for position, tx in enumerate(transformations):
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise TypeError(
                f"chain: argument {position} is {tx!r}; expected a transformation with `init` and"
                " `update`. Call the factory first: adamfn.adam(), not adamfn.adam."
            )
    accepted = [_keywords(tx.update) for tx in transformations]

    def init(params: PyTree) -> PyTree:
        return tuple(tx.init(params) for tx in transformations)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        next_state: list[PyTree] = []
        parts = _parts(state, len(transformations))
        for tx, part, takes in zip(transformations, parts, accepted, strict=True):
            known = extra if takes is None else {k: v for k, v in extra.items() if k in takes}
            updates, part = tx.update(updates, part, params, **known)
            next_state.append(part)
        return updates, tuple(next_state)

    return GradientTransformation(init, update)


def apply_updates(
    params: PyTree,
    updates: PyTree,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    count: chex.Numeric | None = None,
) -> PyTree:
    """Adds updates to parameters: `params + updates`, leaf by leaf.

    The sum is taken in float32 at least and has the parameter's dtype and shape. Where an update
    is `None`, the parameter stays as it is.

    Bfloat16 parameters have 8 bits: an update less than a five-hundredth of its parameter is lost
    when their sum is rounded to nearest, and training stalls. With `rounding="stochastic"` the sum
    is rounded up or down with probabilities that make it right on average, so bfloat16 parameters
    train without a float32 copy.

    Args:
      params: any pytree of floating-point or complex arrays.
      updates: a tree of the same structure and shapes, or with `None` in place of a leaf.
      rounding: how bfloat16 sums are rounded, `"nearest"` or `"stochastic"`.
      count: the step, an integer or an integer scalar, such as a state's `count`: with it the
        noise differs from step to step and is the same when a step is taken again. Needed for
        stochastic rounding.

    Returns:
      The new parameters.

    Raises:
      ValueError: structure or shapes differ; names the leaf. An unknown rounding, or a stochastic
        one without a count.
      TypeError: a leaf is not an array of floating-point or complex numbers, or is float16 and to
        be rounded stochastically.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.array([1.0, 2.0]), "frozen": jnp.array(3.0)}
    >>> updates = {"w": jnp.array([0.5, -0.5]), "frozen": None}
    >>> print(adamfn.apply_updates(params, updates)["w"])
    [1.5 1.5]
    """
    trained = params
    if jax.tree.structure(params, is_leaf=_is_none) == jax.tree.structure(
        updates, is_leaf=_is_none
    ):
        trained = jax.tree.map(
            lambda p, u: None if u is None else p, params, updates, is_leaf=_is_none
        )
    way_out = "Pass the updates that `update` returned for these parameters."
    if rounding == "nearest":
        trees = {"params": trained, "updates": updates}
        moved, *_ = map_leaves(_add, trees, caller="apply_updates", way_out=way_out)
    elif rounding == "stochastic":
        moved = add_stochastically(trained, updates, count, way_out)
    else:
        raise ValueError(
            f"apply_updates: rounding is {rounding!r}; expected 'nearest' or 'stochastic'."
        )
    return jax.tree.map(lambda p, m: p if m is None else m, params, moved, is_leaf=_is_none)


def _add(param: jax.Array, update: jax.Array) -> tuple[jax.Array]:
    return (param + update,)


def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """The extra arguments that an update function takes, or None if it takes any."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters)


def _parts(state: PyTree, expected: int) -> tuple[PyTree, ...]:
    if isinstance(state, tuple):
        parts = cast("tuple[PyTree, ...]", state)
        if len(parts) == expected:
            return parts
        found = f"a tuple of {len(parts)}"
    else:
        found = f"a {type(state).__name__}"
    raise ValueError(
        f"chain: found {found} as the state, expected a tuple of {expected}, one part for each"
        " transformation. The state belongs to another chain: make it with this one's init(params)."
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None
