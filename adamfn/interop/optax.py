"""Adam states between optax and adamfn.

Both keep the same averages under the same names, so a run goes on in either. States are known by
their fields `count`, `mu` and `nu`; optax is not imported.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamfn.interop.states import LeafMoments, fill_moments, find_moments
from adamfn.stages.two_moments import ScaleByMomentsState
from adamfn.trees import PyTree, describe


def from_state(state: PyTree, like: PyTree) -> PyTree:
    """Continues an optax run: converts its state to adamfn's.

    Args:
      state: the state of `optax.adam`, `optax.adamw` or `optax.nadam`, by itself or inside a chain,
        `inject_hyperparams`, `masked`, `partition` or another wrapper.
      like: what the adamfn transformation's `init` returns for the same parameters, also inside
        optax's wrappers.

    Returns:
      `like` with the moments and counts of `state`. Everything else, such as gradients that a
      wrapper accumulates, is that of `like`.

    Raises:
      ValueError: one of the two has no moments, or not those of the same leaves; names the leaf.
      TypeError: one of them is abstract, of `jax.eval_shape`.

    >>> import adamfn, optax
    >>> import jax.numpy as jnp
    >>> from adamfn.interop.optax import from_state
    >>> params = {"w": jnp.ones(2)}
    >>> theirs = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    >>> _, state = theirs.update(params, theirs.init(params), params)
    >>> ours = adamfn.adamw(1e-3)
    >>> state = from_state(state, like=ours.init(params))
    >>> print(state[0].count, state[0].mu["w"])
    1 [0.1 0.1]
    """
    return _move("from_state", state, like)


def to_state(state: PyTree, like: PyTree) -> PyTree:
    """Continues a run in optax: the inverse of `from_state`, with the same arguments.

    The moments get the dtypes of `like`. A state that is not Adam's is an error, such as that of
    `amsgrad`, whose maximum optax takes of another quantity. (optax's Adamax and Yogi keep theirs
    in the state of its Adam, and cannot be told from it.)

    >>> import adamfn, optax
    >>> import jax.numpy as jnp
    >>> from adamfn.interop.optax import to_state
    >>> params = {"w": jnp.ones(2)}
    >>> ours = adamfn.adam(1e-3)
    >>> _, state = ours.update(params, ours.init(params))
    >>> state = to_state(state, like=optax.adam(1e-3).init(params))
    >>> print(type(state[0]).__name__, state[0].count, state[0].mu["w"])
    ScaleByAdamState 1 [0.1 0.1]
    """
    return _move("to_state", state, like)


def _move(caller: str, state: PyTree, like: PyTree) -> PyTree:
    source = _adam_moments(f"{caller}: state", state)
    target = _adam_moments(f"{caller}: like", like)
    for path in {**source, **target}:
        if path not in source or path not in target:
            raise ValueError(
                f"{caller}: only {'state' if path in source else 'like'} has moments of a leaf at"
                f" {path or 'the root'}; expected the same leaves in both, found {_named(source)}"
                f" in state and {_named(target)} in like. Make both for the same parameters."
            )
    for name, tree in (("state", state), ("like", like)):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            raise TypeError(
                f"{caller}: found shapes without values in {name}; expected arrays. Pass what init"
                " returns, outside jax.eval_shape."
            )
    counts = [leaf.node.count for leaf in source.values()]
    known = [count for count in counts if not isinstance(count, Tracer)]
    if not all(np.array_equal(count, known[0]) for count in known):
        raise ValueError(
            f"{caller}: found leaves after {' and '.join(sorted({str(c) for c in counts}))} steps"
            " in the state, expected one count for all of them. Pass one part at a time."
        )

    def leaf_of(field: str, path: str, leaf: Any) -> jax.Array:
        value = source[path].kept[field]
        if value.shape != leaf.shape or jnp.iscomplexobj(value) != jnp.iscomplexobj(leaf):
            raise ValueError(
                f"{caller}: {field} at {path}: found {describe(value)}, expected"
                f" {describe(leaf)}. Make both states for the same parameters."
            )
        return jnp.asarray(value, leaf.dtype)

    return fill_moments(like, jnp.asarray(counts[0], jnp.int32), leaf_of)


def _adam_moments(owner: str, state: PyTree) -> dict[str, LeafMoments]:
    moments = find_moments(owner, state)
    for leaf in moments.values():
        if type(leaf.node).__name__ not in ("ScaleByAdamState", ScaleByMomentsState.__name__):
            raise ValueError(
                f"{owner} holds a {type(leaf.node).__name__}; expected a ScaleByAdamState or a"
                " ScaleByMomentsState, the only ones with the same meaning in both libraries."
            )
    return moments


def _named(moments: dict[str, LeafMoments]) -> str:
    return ", ".join(path or "the root" for path in moments)
