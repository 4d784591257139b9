# SPDX-License-Identifier: Apache-2.0
"""Adam states between optax and adamfn.

Both keep the same averages under the same names, so a run goes on in either. States are known by
their fields `count`, `mu` and `nu`; optax is not imported.
"""

import jax.numpy as jnp
from jax.core import Tracer

from adamfn.interop.states import fill_moments, find_moments
from adamfn.trees import PyTree, check_values, matching_leaves


def from_state(state: PyTree, like: PyTree) -> PyTree:
    """Continues an optax run: converts its state to adamfn's.

    Args:
      state: the state of `optax.adam`, `optax.adamw` or `optax.nadam`, also inside wrappers.
      like: `init` of the adamfn transformation for the same parameters, also inside wrappers.

    Returns:
      `like` with the moments and counts of `state`. Everything else, such as gradients that a
      wrapper accumulates, is that of `like`.

    Raises:
      TypeError, ValueError: one of them has no moments, other leaves, or shapes without values.

    >>> import adamfn, optax, jax.numpy as jnp
    >>> from adamfn.interop.optax import from_state
    >>> params = {"w": jnp.ones(2)}
    >>> theirs = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    >>> _, state = theirs.update(params, theirs.init(params), params)
    >>> ours = adamfn.adamw(1e-3)
    >>> state = from_state(state, like=ours.init(params))
    >>> print(state[0].count, state[0].mu["w"])
    1 [0.1 0.1]
    """
    return _move("from_state", state, like, to="ScaleByMomentsState")


def to_state(state: PyTree, like: PyTree) -> PyTree:
    """Continues a run in optax: the inverse of `from_state`, with the same arguments.

    The moments get the dtypes of `like`. Another optimizer's state is an error, such as that of
    `amsgrad`, whose maximum optax takes of another quantity. (optax's Adamax and Yogi keep theirs
    in the state of its Adam, and cannot be told from it.)

    >>> import adamfn, optax, jax.numpy as jnp
    >>> from adamfn.interop.optax import to_state
    >>> params = {"w": jnp.ones(2)}
    >>> ours = adamfn.adam(1e-3)
    >>> _, state = ours.update(params, ours.init(params))
    >>> state = to_state(state, like=optax.adam(1e-3).init(params))
    >>> print(type(state[0]).__name__, state[0].count, state[0].mu["w"])
    ScaleByAdamState 1 [0.1 0.1]
    """
    return _move("to_state", state, like, to="ScaleByAdamState")


_KINDS = ("ScaleByAdamState", "ScaleByMomentsState")


def _move(caller: str, state: PyTree, like: PyTree, to: str) -> PyTree:
    check_values(caller, state=state, like=like)
    sides = [find_moments(f"{caller}: state", state), find_moments(f"{caller}: like", like)]
    kinds = [[type(leaf.node).__name__ for leaf in side.values()] for side in sides]
    for name, found in zip(("state", "like"), kinds, strict=True):
        for kind in {*found} - {*_KINDS}:
            raise ValueError(
                f"{caller}: {name} holds a {kind}; expected a {_KINDS[0]} or a {_KINDS[1]}, the"
                " only ones with the same meaning in both libraries."
            )
    if kinds[0][0] == to != kinds[1][0]:
        raise TypeError(
            f"{caller}(state, like): found a {to} in state and a {kinds[1][0]} in like; expected"
            " the reverse."
        )
    arrays = [
        {path or "the root": dict(leaf.kept) for path, leaf in side.items()} for side in sides
    ]
    way_out = "Make both for the same parameters."
    matching_leaves(f"{caller}: state", arrays[0], "like", arrays[1], way_out)
    source = sides[0]
    counts = [leaf.node.count for leaf in source.values()]
    known = {str(count) for count in counts if not isinstance(count, Tracer)}
    if len(known) > 1:
        raise ValueError(
            f"{caller}: found leaves after {' and '.join(sorted(known))} steps in the state,"
            " expected one count for all of them. Pass one part at a time."
        )
    return fill_moments(
        like, counts[0], lambda field, path, x: jnp.asarray(source[path].kept[field], x.dtype)
    )
