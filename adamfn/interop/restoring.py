# SPDX-License-Identifier: Apache-2.0
"""`restore`: a state that came back in plain containers, in its types again."""

from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr

from adamfn.formats.arrangement import holds_moments, kept_leaves, scales_key
from adamfn.trees import PyTree, check_swapped, described, path_name


def restore(tree: PyTree, into: PyTree) -> PyTree:
    """Gives a restored state its containers back: the leaves of `tree`, arranged as `into`.

    Leaves are matched by path. A field of a named tuple may have its name or its position there, so
    `tree` may have dictionaries (msgpack, orbax without a target), lists, plain tuples, or be one
    dictionary from whole paths, such as `0/mu/kernel`, to arrays (safetensors). States of adamfn
    0.2.0 are rearranged.

    Args:
      tree: what was restored: any nest of containers with arrays of NumPy or JAX.
      into: the right containers, shapes, dtypes and placement, such as `tx.init(params)` or
        `jax.eval_shape(tx.init, params)`; its values are not used.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or dtype; names it.

    >>> import adamfn, jax.numpy as jnp
    >>> from adamfn.interop import restore
    >>> params = {"w": jnp.ones(2)}
    >>> tx = adamfn.adam()
    >>> _, state = tx.update(params, tx.init(params))
    >>> plain = [state[0]._asdict(), {}, tuple(state[2])]
    >>> state = restore(plain, into=tx.init(params))
    >>> print(type(state[0]).__name__, state[0].count, state[0].mu["w"])
    ScaleByMomentsState 1 [0.1 0.1]
    """
    check_swapped("restore(tree, into)", into, tree)
    found = {
        path_name(path).removesuffix("/value"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    treedef = jax.tree.structure(into)
    indices = treedef.unflatten(range(treedef.num_leaves))
    arrangements = [dict(_paths(indices, {""}, old)) for old in (False, True)]
    chosen = max(arrangements, key=lambda keys: sum(not k.isdisjoint(found) for k in keys.values()))
    rows: list[tuple[str, Any, Any]] = []
    for index, (path, like) in enumerate(jax.tree.leaves_with_path(into)):
        value = next((found.pop(key) for key in chosen[index] if key in found), None)
        if value is None and getattr(path[-1] if path else None, "name", None) == "written":
            value = rows[-1][1]  # the rate before it: states of 0.2.0 had no more
        rows.append((path_name(path), value, like))
    left = ", ".join([*found][:5]) or "none"
    for name, value, like in [*rows, *((key, value, None) for key, value in found.items())]:
        if described(value) != described(like):
            raise ValueError(
                f"restore: at {name or 'the root'} the tree has {described(value)}; expected"
                f" {described(like)}. Leaves of the tree without a place: {left}. Pass the init of"
                " the transformation and parameters that were saved. If the model has grown since,"
                " call adamfn.interop.carry_over; to change the format, adamfn.interop.convert."
            )
    return treedef.unflatten([_placed(value, like) for _, value, like in rows])


def _paths(node: Any, at: set[str], old: bool) -> Iterator[tuple[int, set[str]]]:
    """Each leaf of a tree of indices, and the paths that it may have in a restored tree.

    States of 0.2.0, if `old`, had numbered scales, and a count that could stand around a state.
    """
    if isinstance(node, int):
        yield node, {path[1:].removesuffix("/value") for path in at}
        return
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        fields = cast("Any", node)._asdict()
        if old and holds_moments(node) and isinstance(fields.get("scales"), dict):
            keys = [scales_key(leaf.path) for leaf in kept_leaves(node)]
            fields["scales"] = tuple(fields["scales"].get(key, ()) for key in keys)
        parts = [({name, str(k)}, part) for k, (name, part) in enumerate(fields.items())]
        if old and type(node).__name__.startswith("Counted"):
            inner = enumerate([*fields.items()][1:])
            parts[1:] = [
                ({f"{outer}/{key}" for outer in ("stage", "1") for key in (name, k)}, part)
                for k, (name, part) in inner
            ]
    else:
        children = jax.tree.leaves_with_path(node, is_leaf=lambda part: part is not node)
        parts = [({keystr(path, simple=True)}, part) for path, part in children]
    for names, part in parts:
        yield from _paths(part, {f"{outer}/{name}" for outer in at for name in names}, old)


def _placed(value: Any, like: Any) -> Any:
    placed = not isinstance(like, Tracer) and getattr(like, "committed", True)
    sharding = getattr(like, "sharding", None) if placed else None
    return jnp.array(value) if sharding is None else jax.device_put(value, sharding)
