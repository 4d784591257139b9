# SPDX-License-Identifier: Apache-2.0
"""How a state of moments is arranged, to read one without its transformation.

In a named tuple `mu`, `nu` and all fields before `scales` are trees of one array for each leaf.
`scales` is a dict with an entry, by `scales_key`, for each leaf that has any.
"""

import math
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import jax

from adamfn.trees import PyTree, described, path_name


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
    return [x for x in jax.tree.leaves(state, is_leaf=holds_moments) if holds_moments(x)]


def leaf_fields(node: Any) -> list[str]:
    """The fields of a state of moments that have a part for each leaf."""
    before = takewhile(lambda field: field != "scales", node._fields)
    return [field for field in before if field != "count"]


def kept_leaves(node: Any) -> Iterator[KeptLeaf]:
    """The parts of a state of moments, leaf by leaf; None where the leaf's format has no codes."""
    columns: dict[str, dict[Any, Any]] = {
        field: dict(jax.tree.leaves_with_path(getattr(node, field), is_leaf=lambda x: x is None))
        for field in leaf_fields(node)
    }
    scales: Any = getattr(node, "scales", None)
    for path in columns["mu"]:
        parts = {field: column.get(path) for field, column in columns.items()}
        if any(part is not None for part in parts.values()):
            entry = scales.get(scales_key(path), ()) if hasattr(scales, "get") else ()
            yield KeptLeaf(path, parts, entry)


def describe(state: PyTree) -> str:
    """A table of how every leaf's moments are stored, with bytes and fractions of the total.

    The state may be abstract, from `jax.eval_shape(tx.init, params)`, which costs no memory.

    Raises:
      ValueError: there are no moments in it.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"embedding": jnp.zeros((512, 64)), "kernel": jnp.zeros((64, 256))}
    >>> tx = adamfn.adam(moments=lambda path, leaf: "8bit" if path == "kernel" else "float32")
    >>> print(adamfn.formats.describe(tx.init(params)))  # doctest: +ELLIPSIS
    embedding         262,144 bytes  88.7%  mu float32[512,64]; nu float32[512,64]
    kernel             33,536 bytes  11.3%  mu int8[64,256]; nu uint8[64,256]; scales...
                      295,680 bytes in all
    """
    rows: list[tuple[str, int, str]] = []
    for leaf in (leaf for node in states_of_moments(state) for leaf in kept_leaves(node)):
        fields = {**leaf.parts, "scales": leaf.scales}
        arrays = {name: found for name, x in fields.items() if (found := jax.tree.leaves(x))}
        size = sum(math.prod(x.shape) * x.dtype.itemsize for xs in arrays.values() for x in xs)
        stored = (f"{name} {' + '.join(map(described, xs))}" for name, xs in arrays.items())
        rows.append((path_name(leaf.path) or "the leaf", size, "; ".join(stored)))
    if not rows:
        raise ValueError(
            f"describe: found no moments in {described(state)}; expected a state of adamfn's,"
            " with mu and nu, by itself or inside a chain or a wrapper."
        )
    whole = max(sum(size for _, size, _ in rows), 1)
    width = max(len(path) for path, _, _ in rows)
    lines = [f"{path:<{width}} {n:>15,} bytes {n / whole:>6.1%}  {text}" for path, n, text in rows]
    return "\n".join([*lines, f"{'':<{width}} {whole:>15,} bytes in all"])
