# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations, and how their result is applied.

Nothing here knows of Adam, nor of stages.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.trees import (
    PyTree,
    as_array,
    check_inexact,
    check_values,
    matching_leaves,
    shown,
    wide_dtype,
)

_SUMS = 16


class _InitAndUpdate(NamedTuple):
    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]


class GradientTransformation(_InitAndUpdate):
    """A pair of pure functions that turn gradients into updates.

    `init(params)` makes the state; `update(updates, state, params=None, **extra)` returns the
    transformed updates and the next state. Updates have the structure and shapes of the gradients,
    and their dtypes, except where these would lose them: float16 updates of float32 parameters, and
    updates of `round_weights`, are float32. Extra arguments that no part knows are ignored.

    Optax accepts it wherever it accepts its own, and the reverse.

    >>> import adamfn, jax.numpy as jnp
    >>> def update(updates, state, params=None, **extra):
    ...     return updates * 2, state
    >>> double = adamfn.GradientTransformation(init=lambda params: (), update=update)
    >>> updates, state = double.update(jnp.array([1.0]), double.init(jnp.array([0.0])))
    >>> print(updates)
    [2.]
    """

    __slots__ = ()

    def __reduce__(self) -> Any:
        """How it is pickled: by its type, whatever `isinstance` says."""
        return GradientTransformation, tuple(self)

    @property
    def __class__(self) -> type[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Its type; to `isinstance` also optax's class, where optax is imported.

        Optax's wrappers hand extra arguments on to an instance of that class, and drop them before
        anything else.
        """
        theirs = getattr(sys.modules.get("optax"), "GradientTransformationExtraArgs", None)
        takes_any = callable(self.update) and extra_arguments(self.update) is None
        return theirs if theirs is not None and takes_any else type(self)


def extra_arguments(update: Callable[..., Any]) -> frozenset[str] | None:
    """The extra arguments that an `update` takes, or None if it takes any."""
    parameters = inspect.signature(update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return frozenset(parameters) - {"updates", "state", "params"}


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


def check_transformation(name: str, tx: Any) -> None:
    """Raises TypeError if what the message calls `name` has no `init` and `update`."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            f"{name} is {shown(tx)}; expected a transformation with `init` and `update`. Call the"
            " factory first: adamfn.adam(), not adamfn.adam."
        )


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """Adds updates to parameters: `params + updates`, leaf by leaf.

    The sum is taken in float32 at least and has the parameter's dtype and shape. Where an update
    is `None`, or the gradient of an integer (`jax.dtypes.float0`), the parameter stays as it is;
    where a parameter is `None`, so is the result. Integers are added to integers, as by optax.

    An update below a five-hundredth of its bfloat16 parameter is lost in the sum; `round_weights`,
    last in the chain, makes updates that are not.

    Raises ValueError if structure or shapes differ, and TypeError if a leaf is not an array of
    floating-point or complex numbers; both name the leaf.

    >>> import adamfn, jax.numpy as jnp
    >>> params = {"w": jnp.array([1.0, 2.0]), "frozen": jnp.array(3.0)}
    >>> updates = {"w": jnp.array([0.5, -0.5]), "frozen": None}
    >>> print(adamfn.apply_updates(params, updates)["w"])
    [1.5 1.5]
    """
    check_values("apply_updates", params=params, updates=updates)
    params, updates = _settled(params, updates)
    trained = where_updated(params, updates)
    updates = where_updated(updates, trained)
    check_inexact(trained, "apply_updates: params")
    way_out = "Pass the updates that `update` returned for these parameters."
    added = matching_leaves("apply_updates: params", trained, "updates", updates, way_out)
    leaves, treedef = jax.tree.flatten(trained)
    moved = treedef.unflatten(_added([*map(as_array, leaves)], added))
    return merged(params, moved)


def _settled(params: PyTree, updates: PyTree) -> tuple[PyTree, PyTree]:
    """Parameters with the updates of integers added, and None for these updates."""
    ps, treedef = jax.tree.flatten(params, is_leaf=_is_none)
    us, other = jax.tree.flatten(updates, is_leaf=_is_none)
    for k, pair in enumerate(zip(ps, us, strict=False) if treedef == other else ()):
        if all(jnp.issubdtype(getattr(x, "dtype", float), jnp.integer) for x in pair):
            ps[k], us[k] = (ps[k] + us[k]).astype(ps[k].dtype), None
    return treedef.unflatten(ps), other.unflatten(us)


def _added(params: list[Any], updates: list[Any]) -> list[jax.Array]:
    """The sums, those of one signature a few at a time: that is cheap to trace."""
    alike: dict[Any, list[int]] = {}
    for k, (p, u) in enumerate(zip(params, updates, strict=True)):
        place = None if isinstance(p, Tracer) else getattr(p, "sharding", None)
        key = jnp.shape(p), jnp.result_type(p), jnp.result_type(u), place
        alike.setdefault(key, []).append(k)
    moved = list(params)
    for own in alike.values():
        for numbers in (own[i : i + _SUMS] for i in range(0, len(own), _SUMS)):
            sums = _add([params[k] for k in numbers], [updates[k] for k in numbers])
            for k, total in zip(numbers, sums, strict=True):
                moved[k] = total
    return moved


@jax.jit
def _add(params: list[jax.Array], updates: list[jax.Array]) -> list[jax.Array]:
    return [wide_sum(p, u).astype(p.dtype) for p, u in zip(params, updates, strict=True)]


def wide_sum(param: jax.Array, update: jax.Array) -> jax.Array:
    """The sum in float32, or in the wider of the two dtypes."""
    with jax.numpy_dtype_promotion("standard"):  # the two may differ, whatever the user's own may
        wide = jnp.promote_types(wide_dtype(param.dtype), wide_dtype(update.dtype))
    return param.astype(wide) + update.astype(wide)


def where_updated(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters, with None where an update is None, or the gradient of an integer."""
    structure = jax.tree.structure(params, is_leaf=_is_none)
    if structure != jax.tree.structure(updates, is_leaf=_is_none):
        return params  # a check to come says where they differ
    return jax.tree.map(
        lambda p, u: None if _has_no_value(u) else p, params, updates, is_leaf=_is_none
    )


def merged(params: PyTree, moved: PyTree) -> PyTree:
    """The moved parameters, and the others where they are None."""
    return jax.tree.map(lambda p, m: p if m is None else m, params, moved, is_leaf=_is_none)


def _has_no_value(update: Any) -> bool:
    return update is None or getattr(update, "dtype", None) == jax.dtypes.float0


def _is_none(leaf: Any) -> bool:
    return leaf is None
