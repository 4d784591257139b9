"""How a state of moments is arranged, to read one without its transformation.

In a named tuple `mu`, `nu` and all fields before `scales` are trees of one array for each leaf.
`scales` is a dict with an entry, by `scales_key`, for each leaf that has any.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax

from adamfn.trees import PyTree, path_name


class KeptLeaf(NamedTuple):
    """The parts of a state that belong to one leaf, by field, and its scales or `()`."""

    path: Any
    parts: dict[str, Any]
    scales: PyTree


def scales_key(path: Any) -> str:
    """The key of a leaf in `scales`: its path's name, and "leaf" for a bare array."""
    return path_name(path) or "leaf"


def holds_moments(node: Any) -> bool:
    """Whether a node is a state of moments, ours or optax's: they share the fields' names."""
    return {"mu", "nu"} <= set(getattr(node, "_fields", ()))


def states_of_moments(state: PyTree) -> list[Any]:
    """The states of moments in a state, however deep."""
    nodes = jax.tree.leaves(state, is_leaf=holds_moments)
    return [node for node in nodes if holds_moments(node)]


def leaf_fields(node: Any) -> list[str]:
    """The fields of a state of moments that have a part for each leaf."""
    fields = list(node._fields)
    end = fields.index("scales") if "scales" in fields else len(fields)
    return [field for field in fields[:end] if field != "count"]


def kept_leaves(node: Any) -> Iterator[KeptLeaf]:
    """The parts of a state of moments, leaf by leaf; None where the leaf's format has no codes."""
    names = leaf_fields(node)
    columns = [dict(_leaves(getattr(node, name))) for name in names]
    scales = getattr(node, "scales", None)
    entries = cast("Mapping[str, Any]", scales if isinstance(scales, Mapping) else {})
    for path in columns[0]:
        parts = {name: column.get(path) for name, column in zip(names, columns, strict=True)}
        if any(part is not None for part in parts.values()):
            yield KeptLeaf(path, parts, entries.get(scales_key(path), ()))


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is None)
