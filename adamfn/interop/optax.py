"""Adam states between optax and adamfn.

Both keep the same averages under the same names, so a run goes on in either. States are known by
their fields `count`, `mu` and `nu`; optax is not imported.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.interop.states import LeafMoments, fill_moments, find_moments
from adamfn.trees import PyTree, describe


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


def _move(caller: str, state: PyTree, like: PyTree, to: str) -> PyTree:
    source = _adam_moments(f"{caller}: state", state)
    target = _adam_moments(f"{caller}: like", like)
    kinds = [type(next(iter(side.values())).node).__name__ for side in (source, target)]
    if kinds[0] == to != kinds[1]:
        raise TypeError(
            f"{caller}(state, like): found a {kinds[0]} in state and a {kinds[1]} in like; expected"
            " the reverse."
        )
    for path in sorted({**source, **target}):
        for field in ("mu", "nu"):
            a, b = (side[path].kept[field] if path in side else None for side in (source, target))
            known = a is not None and b is not None and a.shape == b.shape
            if not known or jnp.iscomplexobj(a) != jnp.iscomplexobj(b):
                raise ValueError(
                    f"{caller}: {field} at {path or 'the root'}: found {describe(a)} in state,"
                    f" expected {describe(b)} as in like. Make both for the same parameters."
                )
    counts = [leaf.node.count for leaf in source.values()]
    known = {str(count) for count in counts if not isinstance(count, Tracer)}
    if len(known) > 1:
        raise ValueError(
            f"{caller}: found leaves after {' and '.join(sorted(known))} steps in the state,"
            " expected one count for all of them. Pass one part at a time."
        )

    def leaf_of(field: str, path: str, leaf: Any) -> jax.Array:
        return jnp.asarray(source[path].kept[field], leaf.dtype)

    return fill_moments(like, counts[0], leaf_of)


def _adam_moments(owner: str, state: PyTree) -> dict[str, LeafMoments]:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state)):
        raise TypeError(
            f"{owner} has shapes without values; expected arrays. Pass what init returns, outside"
            " jax.eval_shape."
        )
    moments = find_moments(owner, state)
    for leaf in moments.values():
        if type(leaf.node).__name__ not in ("ScaleByAdamState", "ScaleByMomentsState"):
            raise ValueError(
                f"{owner} holds a {type(leaf.node).__name__}; expected a ScaleByAdamState or a"
                " ScaleByMomentsState, the only ones with the same meaning in both libraries."
            )
    return moments
