"""Finding the moments in a state and filling them in, whatever the state is wrapped in."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from adamfn.formats.arrangement import holds_moments, kept_leaves, leaf_fields, states_of_moments
from adamfn.trees import PyTree, path_name

_COUNTERS = (
    "CountedState",
    "InjectHyperparamsState",
    "InjectStatefulHyperparamsState",
    "ScaleByScheduleState",
    "WrappedScheduleState",
)
"""States whose `count` is that of the optimizer's steps, ours and optax's. Others' is their own."""


class LeafMoments(NamedTuple):
    """What one state keeps of one leaf."""

    node: Any
    """The state it was found in, such as a `ScaleByMomentsState`."""
    kept: Mapping[str, Any]
    """The leaf of each of that state's trees, by field: `mu`, `nu` and any more."""


def find_moments(owner: str, state: PyTree) -> dict[str, LeafMoments]:
    """The moments of every leaf, by its path and in the order of the parameters' leaves.

    Args:
      owner: what error messages call the state.
      state: any tree with states of moments in it. Where there are several, each of some leaves,
        the others' places hold None or `optax.MaskedNode()`.

    Raises:
      ValueError: there are no moments, or two states have those of one leaf, or they are stored
        in codes.
    """
    nodes = moment_states(owner, state)
    found: dict[str, LeafMoments | None] = {}
    for node in nodes:
        _check_exact(owner, node)
        columns = {field: leaves_by_path(getattr(node, field)) for field in leaf_fields(node)}
        for path, leaf in columns["mu"].items():
            if leaf is not None and found.get(path) is not None:
                raise ValueError(
                    f"{owner}: found two states with moments of the leaf at {path}; expected one."
                    " Pass the part of the state that is meant."
                )
            kept = {field: column.get(path) for field, column in columns.items()}
            found[path] = found.get(path) if leaf is None else LeafMoments(node, kept)
    return {path: moments for path, moments in found.items() if moments is not None}


def moment_states(owner: str, state: PyTree) -> list[Any]:
    """The states of moments in a state.

    Raises:
      ValueError: there are none, or packed ones.
    """
    nodes = states_of_moments(state)
    if not any(jax.tree.leaves((node.mu, node.nu)) for node in nodes):
        raise ValueError(
            f"{owner}: found no moments in a {type(state).__name__}; expected the state of an Adam,"
            " with count, mu and nu, by itself or inside a chain or a wrapper."
        )
    for node in nodes:
        if "buffers" in getattr(node.mu, "_fields", ()):
            raise ValueError(
                f"{owner} is packed, with moments of several leaves in one buffer; expected the"
                " chain's. adamfn.repack makes it of a packed one, and the reverse."
            )
    return nodes


def _check_exact(owner: str, node: Any) -> None:
    for path, parts, scales in kept_leaves(node):
        arrays = jax.tree.leaves(parts, is_leaf=lambda part: part is None)
        if jax.tree.leaves(scales) or not all(map(_is_inexact, arrays)):
            raise ValueError(
                f"{owner}: the moments are stored in codes, such as those at"
                f" {path_name(path) or 'the root'}; expected arrays of floating point. Lean moments"
                " stay where they are: only those of moments='float32' and 'bfloat16' cross over."
            )


def _is_inexact(leaf: Any) -> bool:
    return leaf is not None and jnp.issubdtype(leaf.dtype, jnp.inexact)


def fill_moments(
    like: PyTree,
    count: jax.Array,
    leaf_of: Callable[[str, str, Any], jax.Array],
    **scalars: jax.Array,
) -> PyTree:
    """A state with other moments and counts.

    Args:
      like: the state. What is neither moment nor count stays.
      count: goes to every count of steps: the moments' own, a schedule's, a correction's.
      leaf_of: the moment for a field, the path of a leaf, and what `like` has there.
      **scalars: by field, what some states of moments keep besides.
    """

    def fill(node: Any) -> Any:
        if not hasattr(node, "_fields"):
            return node
        filled: dict[str, Any] = {"count": jnp.array(count)}  # a copy: a buffer is donated once
        for field in node._fields:
            if not holds_moments(node) and field != "count":
                filled[field] = walk(getattr(node, field))
            elif field in scalars:
                filled[field] = scalars[field]
            elif field in (leaf_fields(node) if holds_moments(node) else ()):
                filled[field] = jax.tree.map_with_path(
                    lambda p, leaf, field=field: leaf_of(field, path_name(p), leaf),
                    getattr(node, field),
                )
        return node._replace(**filled)

    def walk(tree: PyTree) -> PyTree:
        return jax.tree.map(fill, tree, is_leaf=_counts_steps)

    return walk(like)


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """A tree's leaves by their paths, such as `layers/0/kernel`; None at what is masked."""
    leaves = cast("list[tuple[Any, Any]]", jax.tree.leaves_with_path(tree, is_leaf=_is_placeholder))
    named = {path_name(path): None if _is_placeholder(leaf) else leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        names = [path_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"Two leaves have the path {twice}; expected a path for each. Rename a key that has a"
            " slash in it."
        )
    return named


def _counts_steps(node: Any) -> bool:
    return holds_moments(node) or type(node).__name__ in _COUNTERS


def _is_placeholder(leaf: Any) -> bool:
    return leaf is None or type(leaf).__name__ == "MaskedNode"
