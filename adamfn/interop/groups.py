"""Several transformations side by side, each for some leaves."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax

from adamfn.chains.segment import way_out
from adamfn.chains.transform import GradientTransformation, Transformation
from adamfn.stages.learning_rate import ScaleByLrState
from adamfn.trees import PyTree, path_name


def by_group(
    groups: Mapping[str, int],
    transformations: Sequence[Transformation],
    *,
    one_rate: bool = False,
) -> GradientTransformation:
    """Applies to each leaf the transformation of its group.

    Args:
      groups: the number of its transformation for each leaf, by the leaf's path.
      transformations: one for each group.
      one_rate: whether all take the learning rate that the first one takes.

    Returns:
      A `GradientTransformation` whose state is the tuple of theirs. Each has the whole tree's
      structure, with None at the leaves of the others.
    """

    def chosen(tree: PyTree, group: int) -> PyTree:
        def leaf_of(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            if name not in groups:
                raise ValueError(
                    f"by_group: found a leaf at {name}, which has no group; expected"
                    f" {', '.join(groups)}. Pass the tree that the state was made for."
                )
            return leaf if groups[name] == group else None

        return jax.tree.map_with_path(leaf_of, tree)

    def init(params: PyTree) -> PyTree:
        return tuple(tx.init(chosen(params, k)) for k, tx in enumerate(transformations))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        if not isinstance(state, tuple) or len(cast("tuple[Any]", state)) != len(transformations):
            raise TypeError(
                f"by_group: found a state of type {type(state).__name__}; expected a tuple of"
                f" {len(transformations)}, one part for each group."
                f" {way_out(None if isinstance(state, tuple) else state, 'transformation')}"
            )
        next_state: list[PyTree] = []
        found: dict[str, Any] = {}
        for k, (tx, part) in enumerate(zip(transformations, state, strict=True)):
            moved, part = tx.update(chosen(updates, k), part, chosen(params, k), **extra)
            leaves = cast("list[tuple[Any, Any]]", jax.tree.leaves_with_path(moved))
            found |= {path_name(path): leaf for path, leaf in leaves}
            next_state.append(part)
            if one_rate and k == 0:
                extra = _rate_in(part) | extra
        merged = jax.tree.map_with_path(lambda path, _: found[path_name(path)], updates)
        return merged, tuple(next_state)

    return GradientTransformation(init, update)


def _rate_in(state: PyTree) -> dict[str, Any]:
    """The learning rate that a state remembers, as an argument; empty if it remembers none."""
    nodes = jax.tree.leaves(state, is_leaf=_remembers_rate)
    rates = [node.learning_rate for node in nodes if _remembers_rate(node)]
    return {"learning_rate": rates[0]} if rates else {}


def _remembers_rate(node: Any) -> bool:
    return isinstance(node, ScaleByLrState)
