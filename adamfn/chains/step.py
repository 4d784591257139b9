"""`step`: one training update, from gradients to the next parameters."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax

from adamfn.chains.segment import Wanted
from adamfn.chains.transform import (
    GradientTransformation,
    Transformation,
    apply_updates,
    check_transformation,
    merged,
    where_updated,
)
from adamfn.trees import PyTree


class Advance(Protocol):
    """The type of a function that takes a step: what `update` and `step` have in common."""

    def __call__(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, Any],
        wanted: Wanted,
    ) -> tuple[PyTree, PyTree, PyTree]:
        """Returns the updates and the moved parameters, as far as wanted, and the next state."""
        ...


class _Own(NamedTuple):
    """What an `update` of ours knows besides."""

    update: Any
    """Itself: `functools.wraps` gives its attributes to functions that do something else."""
    advance: Advance
    takes: Collection[str] | None
    """The extra arguments that it takes; None for any."""
    structure: Any
    """What a chain may join with its neighbours; None if it is to be left whole."""
    made_of: Any
    """The structure whose states its own state has, for those who only read them."""


def assemble(
    init: Callable[[PyTree], PyTree],
    advance: Advance,
    takes: Collection[str] | None,
    structure: Any = None,
    made_of: Any = None,
) -> GradientTransformation:
    """The transformation of an `advance`, which has a step of its own.

    Args:
      init: makes the state.
      advance: takes a step.
      takes: the extra arguments that it takes; None for any.
      structure: what a chain may join with its neighbours; None if it is to be left whole.
      made_of: the structure of what is left whole.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        updates, _, state = advance(updates, state, params, extra, Wanted())
        return updates, state

    # An attribute of a function survives where a transformation is copied, pickled or mapped.
    cast("Any", update).own = _Own(
        update, advance, takes, structure, made_of if structure is None else structure
    )
    return GradientTransformation(init, update)


def own_of(tx: Any) -> _Own | None:
    """What the `update` of a transformation of ours knows besides."""
    own = getattr(tx.update, "own", None)
    return own if isinstance(own, _Own) and own.update is tx.update else None


def step(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree = None,
    *,
    return_updates: bool = False,
    **extra: Any,
) -> Any:
    """One training update, from gradients to the next parameters.

    A chain that ends in stages of ours moves the parameters in the same pass over memory as the
    moments, on CPU in native code. Of any other transformation it is `update` and `apply_updates`.

    Args:
      tx: any transformation, ours or optax's.
      grads: the gradients; None where a leaf is not trained.
      state: the transformation's state. Donate it and the parameters to the jitted function that
        this is called in, and return them in the order in which that function takes them: they
        are then written in place. (JAX pairs donated arrays of one shape with results by order;
        `(state, params)` against `(params, state)` costs a copy of each.)
      params: the parameters: any pytree, such as an Equinox module.
      return_updates: whether to return the updates too, to be logged.
      **extra: what `update` takes besides, such as `learning_rate=`.

    Returns:
      The next parameters and the next state; with `return_updates` the updates after them.

    Raises:
      TypeError, ValueError: as `tx.update` and `apply_updates`; an argument in `extra` that no part
        of the chain takes.

    >>> from functools import partial
    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> @partial(jax.jit, donate_argnums=(0, 1))
    ... def train_step(params, state):
    ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    ...     return adamfn.step(tx, grads, state, params)
    >>> params, state = train_step(params, state)
    >>> print(params["w"])
    [ 0.9 -1.9]
    """
    check_transformation("step(tx, grads, state, params): tx", tx)
    if params is None and jax.tree.leaves(grads):
        raise TypeError("step: found no params; expected step(tx, grads, state, params).")
    check_extra(tx, extra, "step")
    own = own_of(tx)
    if own is None:
        updates, state = tx.update(grads, state, params, **extra)
        params = apply_updates(params, updates)
    else:
        wanted = Wanted(updates=return_updates, params=True)
        trained = where_updated(params, grads)
        updates, moved, state = own.advance(grads, state, trained, extra, wanted)
        params = merged(params, moved)
    return (params, state, updates) if return_updates else (params, state)


def check_extra(tx: Transformation, extra: Mapping[str, Any], name: str) -> None:
    """Checks that some part of a chain of ours takes each extra argument.

    Args:
      tx: any transformation; of one that is not ours nothing is known.
      extra: the arguments.
      name: what the error message calls the function that was given them.

    Raises:
      TypeError: no part takes one of them.
    """
    own = own_of(tx) if hasattr(tx, "update") else None
    takes = own and own.takes
    if takes is None:
        return
    for argument, value in extra.items():
        if argument not in takes:
            known = ", ".join(f"{taken}=" for taken in sorted(takes)) or "none"
            raise TypeError(
                f"{name}: found the argument {argument}={value!r}, which no part of the chain"
                f" takes; expected {known}."
            )
