"""How a state of moments is arranged, for those who are given one without its transformation.

A named tuple with `mu` and `nu`: what is kept of each leaf under the leaf's path, in these fields
and in any before `scales`; `scales` has an entry for each leaf in their order, or is empty.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from adamfn.trees import PyTree, path_name


class KeptLeaf(NamedTuple):
    """What a state keeps of one leaf."""

    path: Any
    parts: dict[str, Any]
    """An array or None for each field; something else in the state of another library."""
    scales: PyTree
    """Its entry of scales; empty if it has none."""


def holds_moments(node: Any) -> bool:
    """Whether a node is a state of moments, ours or optax's: they share the fields' names."""
    return {"mu", "nu"} <= set(getattr(node, "_fields", ()))


def states_of_moments(state: PyTree) -> list[Any]:
    """The states of moments in a state, wherever they stand."""
    nodes = jax.tree.leaves(state, is_leaf=holds_moments)
    return [node for node in nodes if holds_moments(node)]


def leaf_fields(node: Any) -> list[str]:
    """The fields of a state of moments that are kept of each leaf."""
    fields = list(node._fields)
    end = fields.index("scales") if "scales" in fields else len(fields)
    return [field for field in fields[:end] if field != "count"]


def kept_leaves(node: Any) -> Iterator[KeptLeaf]:
    """What a state of moments keeps of every leaf, in their order."""
    names = leaf_fields(node)
    columns = [dict(_leaves(getattr(node, name))) for name in names]
    paths = [
        path
        for path in columns[0]
        if any(column.get(path) is not None for column in columns)  # masked leaves are kept nowhere
    ]
    scales = getattr(node, "scales", {})
    entries: Any = scales if isinstance(scales, dict) else {}
    for path in paths:
        parts = {name: column.get(path) for name, column in zip(names, columns, strict=True)}
        whole = max(parts.values(), key=lambda x: 0 if x is None else x.size)
        parts = {
            name: None if x is None or (x.ndim and not x.size and whole.size) else x
            for name, x in parts.items()
        }
        yield KeptLeaf(path, parts, entries.get(scales_key(path), ()))


def scales_key(path: Any) -> str:
    """The key of a leaf in `scales`: its path, such as `layers/0/kernel`."""
    return path_name(path) or "leaf"


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is None)
