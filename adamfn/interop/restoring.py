"""`restore`: a state that came back in plain containers, in its own again."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.trees import PyTree, describe, path_name


def restore(tree: PyTree, into: PyTree) -> PyTree:
    """Gives a restored state its containers back: the leaves of `tree`, arranged as `into`.

    Leaves are matched by path. A field of a named tuple goes by its name or by its position, so
    `tree` may have dictionaries (msgpack, orbax without a target), lists, plain tuples, or be one
    dictionary from whole paths, such as `0/mu/kernel`, to arrays (safetensors).

    Args:
      tree: what was restored: any nest of containers with arrays of NumPy or JAX.
      into: a tree of the right containers, shapes and dtypes, such as `tx.init(params)` or
        `jax.eval_shape(tx.init, params)`; its values are not used.

    Returns:
      The structure of `into` with the values of `tree`, which lie where the leaves of `into` were
      put.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or dtype: names it.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn.interop import restore
    >>> params = {"w": jnp.ones(2)}
    >>> tx = adamfn.adam()
    >>> _, state = tx.update(params, tx.init(params))
    >>> plain = [state[0]._asdict(), {}, tuple(state[2])]
    >>> state = restore(plain, into=tx.init(params))
    >>> print(type(state[0]).__name__, state[0].count, state[0].mu["w"])
    ScaleByMomentsState 1 [0.1 0.1]
    """
    found = dict(zip(_paths(tree), jax.tree.leaves(tree), strict=True))
    likes, treedef = jax.tree.flatten(into)
    leaves: list[Any] = []
    used: set[str] = set()
    for name, position, like in zip(_paths(into), _paths(_plain(into)), likes, strict=True):
        # Flax's variables may have become dictionaries that hold a value.
        keys = name, position, f"{name}/value", f"{position}/value"
        key = next((key for key in keys if key in found), None)
        if key is None:
            raise ValueError(
                f"restore: the tree has nothing at {name}; expected {describe(like)}, and found"
                f" {_some(found)}. {_WAY_OUT}"
            )
        used.add(key)
        leaves.append(_placed(name, found[key], like))
    left = [key for key in found if key not in used]
    if left:
        raise ValueError(
            f"restore: the tree has leaves for which `into` has no place: {_some(left)}. {_WAY_OUT}"
        )
    return treedef.unflatten(leaves)


_WAY_OUT = (
    "Pass the init of the transformation and parameters that were saved. A model that has grown"
    " since goes on by adamfn.interop.carry_over, in another format by adamfn.interop.convert."
)


def _placed(name: str, value: Any, like: Any) -> Any:
    if describe(value) != describe(like):
        raise ValueError(
            f"restore: at {name} the tree has {describe(value)}; expected {describe(like)}."
            f" {_WAY_OUT}"
        )
    placed = not isinstance(like, Tracer) and getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if placed else None
    return jnp.array(value) if sharding is None else jax.device_put(value, sharding)


def _paths(tree: PyTree) -> list[str]:
    return [path_name(path) for path, _ in jax.tree.leaves_with_path(tree)]


def _plain(tree: PyTree) -> PyTree:
    """The tree with plain tuples in place of named ones."""
    return jax.tree.map(
        lambda node: tuple(map(_plain, node)) if _is_named(node) else node, tree, is_leaf=_is_named
    )


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _some(names: Any) -> str:
    shown = [name or "the root" for name in names]
    return (", ".join(shown[:5]) or "nothing") + (", ..." if len(shown) > 5 else "")
