"""`restore`: a state that came back in plain containers, in its types again."""

from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr

from adamfn.formats.arrangement import holds_moments, kept_leaves, scales_key
from adamfn.trees import PyTree, describe, path_name


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
    found = {
        path_name(path).removesuffix("/value"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    treedef = jax.tree.structure(into)
    arrangements = [_keys(treedef, old=old) for old in (False, True)]
    chosen = max(arrangements, key=lambda keys: sum(not own.isdisjoint(found) for own in keys))
    rows: list[tuple[str, Any, Any]] = []
    for (path, like), keys in zip(jax.tree.leaves_with_path(into), chosen, strict=True):
        key = next((key for key in keys if key in found), "")
        rows.append((path_name(path), found.pop(key, None), like))
    left = ", ".join([*found][:5]) or "none"
    for name, value, like in [*rows, *((key, value, None) for key, value in found.items())]:
        if describe(value) != describe(like):
            raise ValueError(
                f"restore: at {name or 'the root'} the tree has {describe(value)}; expected"
                f" {describe(like)}. Leaves of the tree without a place: {left}. Pass the init of"
                " the transformation and parameters that were saved. If the model has grown since,"
                " call adamfn.interop.carry_over; to change the format, adamfn.interop.convert."
            )
    return treedef.unflatten([_placed(value, like) for _, value, like in rows])


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
            part.key if _is_field(part) else (keystr((part,), simple=True),) for part in path
        ]
        joined = ("/".join(map(str, parts)) for parts in product(*options))
        keys[index] = {key.removesuffix("/value") for key in joined}
    return keys


def _is_field(part: Any) -> bool:
    return isinstance(getattr(part, "key", None), _Field)


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


def _placed(value: Any, like: Any) -> Any:
    placed = not isinstance(like, Tracer) and getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if placed else None
    return jnp.array(value) if sharding is None else jax.device_put(value, sharding)
