# SPDX-License-Identifier: Apache-2.0
"""Finding the moments in a state and filling them in, whatever wraps the state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.formats.arrangement import holds_moments, kept_leaves, leaf_fields, states_of_moments
from adamfn.trees import PyTree, leaves_by_path, path_name

_COUNTERS = {
    *("InjectHyperparamsState", "InjectStatefulHyperparamsState"),
    *("ScaleByScheduleState", "WrappedScheduleState"),
}
"""Optax's states that count the optimizer's steps; other counts of its states are not of these."""


class LeafMoments(NamedTuple):
    """The moments of one leaf by field, `mu`, `nu` and any more, and the state that holds them."""

    node: Any
    kept: Mapping[str, Any]


def find_moments(owner: str, state: PyTree) -> dict[str, LeafMoments]:
    """The moments of every leaf, by its path and in the order of the parameters' leaves."""
    found: dict[str, LeafMoments] = {}
    nodes = moment_states(owner, state)
    for node in nodes:
        for path, parts, scales in kept_leaves(node):
            name = path_name(path)
            exact = (x is not None and jnp.issubdtype(x.dtype, jnp.inexact) for x in parts.values())
            if jax.tree.leaves(scales) or not all(exact):
                raise ValueError(
                    f"{owner}: the moments are stored in codes, such as those at"
                    f" {name or 'the root'}; expected moments='float32' or 'bfloat16', the only"
                    " ones that other libraries take. adamfn.interop.convert makes them."
                )
            if name in found:
                raise ValueError(
                    f"{owner}: found two states with moments of the leaf at {name}; expected one."
                    " Pass the part of the state that is meant."
                )
            found[name] = LeafMoments(node, parts)
    order = dict.fromkeys(path for node in nodes for path in leaves_by_path(node.mu))
    return {path: found[path] for path in order if path in found}


def moment_states(owner: str, state: PyTree) -> list[Any]:
    """The states of moments in a state."""
    nodes = states_of_moments(state)
    if not any(jax.tree.leaves((node.mu, node.nu)) for node in nodes):
        raise ValueError(
            f"{owner}: found no moments in a {type(state).__name__}; expected the state of an Adam,"
            " with count, mu and nu, by itself or inside a chain or a wrapper."
        )
    if any("buffers" in getattr(node.mu, "_fields", ()) for node in nodes):
        raise ValueError(
            f"{owner} is packed: one buffer holds the moments of several leaves; expected the state"
            " of the plain chain. adamfn.repack converts one into the other."
        )
    return nodes


def fill_moments(
    like: PyTree, count: Any, leaf_of: Callable[[str, str, Any], jax.Array], **scalars: jax.Array
) -> PyTree:
    """The state `like` with other moments, counts and, by field, other scalars.

    `leaf_of` makes a moment from its field, the path of its leaf, and what `like` has there.
    """

    def filled(node: Any) -> Any:
        moments = leaf_fields(node) if holds_moments(node) else []
        new: dict[str, Any] = {}
        for field, part in node._asdict().items() if _counts_steps(node) else ():
            if field == "count":
                new[field] = jnp.array(count, jnp.int32)  # a copy: a buffer is donated once
            elif field in moments:
                new[field] = jax.tree.map_with_path(
                    lambda path, x, field=field: leaf_of(field, path_name(path), x), part
                )
            else:
                new[field] = scalars.get(field, fill_moments(part, count, leaf_of, **scalars))
        return node._replace(**new) if new else node

    return jax.tree.map(filled, like, is_leaf=_counts_steps)


def _counts_steps(node: Any) -> bool:
    kind: Any = type(node)
    ours = kind.__module__.startswith("adamfn.") and "count" in getattr(kind, "_fields", ())
    return ours or holds_moments(node) or kind.__name__ in _COUNTERS
