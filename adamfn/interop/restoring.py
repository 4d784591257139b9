"""`restore`: a state that came back in plain containers, in its types again."""

from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr

from adamfn.formats.arrangement import holds_moments, kept_leaves, scales_key
from adamfn.trees import PyTree, describe, path_name

_WAY_OUT = (
    "Pass the init of the transformation and parameters that were saved. If the model has grown"
    " since, call adamfn.interop.carry_over; to change the format, adamfn.interop.convert."
)


def restore(tree: PyTree, into: PyTree) -> PyTree:
    """Gives a restored state its containers back: the leaves of `tree`, arranged as `into`.

    Leaves are matched by path. A field of a named tuple has its name or its position there, so
    `tree` may have dictionaries (msgpack, orbax without a target), lists, plain tuples, or be one
    dictionary from whole paths, such as `0/mu/kernel`, to arrays (safetensors). The states of
    adamfn 0.2.0, whose scales were numbered and whose count could stand around a state, are
    rearranged.

    Args:
      tree: what was restored: any nest of containers with arrays of NumPy or JAX.
      into: a tree of the right containers, shapes and dtypes, such as `tx.init(params)` or
        `jax.eval_shape(tx.init, params)`; its values are not used.

    Returns:
      The structure of `into` with the values of `tree`, placed like the leaves of `into`.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or dtype; names it.

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
    found = {_key(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    treedef = jax.tree.structure(into)
    arrangements = [_keys(treedef, old=old) for old in (False, True)]
    chosen = max(arrangements, key=lambda keys: sum(not own.isdisjoint(found) for own in keys))
    leaves: list[Any] = []
    used: set[str] = set()
    for (path, like), keys in zip(jax.tree.leaves_with_path(into), chosen, strict=True):
        key = next((key for key in keys if key in found), None)
        name = path_name(path)
        if key is not None:
            used.add(key)
            leaves.append(_placed(name, found[key], like))
        else:
            raise ValueError(
                f"restore: the tree has nothing at {name}; expected {describe(like)}, and found"
                f" {_some(found)}. {_WAY_OUT}"
            )
    left = [key for key in found if key not in used]
    if left:
        raise ValueError(
            f"restore: the tree has leaves for which `into` has no place: {_some(left)}. {_WAY_OUT}"
        )
    return treedef.unflatten(leaves)


class _Field(NamedTuple):
    """A field of a named tuple, which a restored tree has by its name or its position."""

    name: str
    position: int


def _keys(treedef: Any, *, old: bool) -> list[set[str]]:
    """The paths that each leaf may have in a restored tree, of adamfn 0.2.0 if `old`."""
    keys: list[set[str]] = [set() for _ in range(treedef.num_leaves)]
    indices = treedef.unflatten(range(treedef.num_leaves))
    for path, index in jax.tree.leaves_with_path(_plain(indices, old)):
        options: list[Any] = [
            part.key
            if isinstance(getattr(part, "key", None), _Field)
            else (keystr((part,), simple=True),)
            for part in path
        ]
        keys[index] = {
            "/".join(map(str, parts)).removesuffix("/value") for parts in product(*options)
        }
    return keys


def _plain(tree: PyTree, old: bool) -> PyTree:
    """The tree with dictionaries from `_Field`s in place of named tuples."""

    def pack(fields: dict[str, Any]) -> Any:
        return {_Field(name, k): part for k, (name, part) in enumerate(fields.items())}

    def plain(node: Any) -> Any:
        if not _is_named(node):
            return node
        fields = {name: _plain(part, old) for name, part in node._asdict().items()}
        if old and holds_moments(node) and isinstance(fields.get("scales"), dict):
            keys = [scales_key(leaf.path) for leaf in kept_leaves(node)]
            fields["scales"] = tuple(fields["scales"].get(key, ()) for key in keys)
        if old and type(node).__name__.startswith("Counted"):
            count = fields.pop("count")
            fields = {"count": count, "stage": pack(fields)}
        return pack(fields)

    return jax.tree.map(plain, tree, is_leaf=_is_named)


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _key(path: Any) -> str:
    """A path; variables of Flax may have become dictionaries that hold a `value`."""
    return path_name(path).removesuffix("/value")


def _placed(name: str, value: Any, like: Any) -> Any:
    if describe(value) != describe(like):
        raise ValueError(
            f"restore: at {name} the tree has {describe(value)}; expected {describe(like)}."
            f" {_WAY_OUT}"
        )
    placed = not isinstance(like, Tracer) and getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if placed else None
    return jnp.array(value) if sharding is None else jax.device_put(value, sharding)


def _some(names: Any) -> str:
    shown = [name or "the root" for name in names]
    return (", ".join(shown[:5]) or "nothing") + (", ..." if len(shown) > 5 else "")
