# SPDX-License-Identifier: Apache-2.0
"""`carry_over`: a run whose model got other parameters."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from adamfn.chains.leaves import way_out
from adamfn.chains.transform import GradientTransformation, Transformation, check_transformation
from adamfn.formats.arrangement import holds_moments, leaf_fields, scales_key
from adamfn.interop.states import moment_states
from adamfn.trees import PyTree, check_inexact, check_swapped, described, leaves_by_path, path_name


class CarriedOver(NamedTuple):
    """How a run goes on with its new parameters."""

    tx: Transformation
    state: PyTree
    new: tuple[str, ...]
    """Paths of parameters whose moments begin at zero: added ones, and those of another shape."""
    dropped: tuple[str, ...]
    """Paths whose moments were dropped: of removed parameters, and those of another shape."""


def carry_over(
    tx: Transformation,
    state: PyTree,
    params: PyTree,
    *,
    one_count: bool = False,
    late: Transformation | None = None,
) -> CarriedOver:
    """Continues a run after parameters were added or removed.

    The state of a parameter with the same path and shape is carried over to the bit, in any format.
    The others begin at zero. As in torch, each of these late parameters is corrected for the steps
    that it has taken itself. For this they get a transformation of their own, which follows the
    rate of the others, and the state becomes a pair, whose `step` is an `update` and a sum.

    With `one_count`, `tx` and the structure of its state stay as they are. Late parameters are then
    corrected as if they had taken all steps, and their first steps are up to (1 - b1) / sqrt(1 -
    b2) rates long, 3.2 with the default decays. A warmup or a smaller rate hides that.

    Args:
      tx: the run's transformation: any that keeps moments, also in wrappers. Masks and labels that
        it was given must fit the new parameters; a function does.
      state: its state for the old parameters.
      params: the new parameters: any pytree of floating-point arrays.
      one_count: whether late parameters share the count of the others.
      late: the transformation of the late parameters, with its own rate; None for that of the
        others. The result of `from_state_dict` with several groups needs one.

    Raises:
      TypeError, ValueError: a state without moments, a packed one, or one not made by `tx`.

    >>> import adamfn, jax.numpy as jnp
    >>> from adamfn.interop import carry_over
    >>> params = {"w": jnp.ones(2), "old": jnp.ones(1)}
    >>> tx = adamfn.adam(0.1)
    >>> _, state = tx.update(params, tx.init(params))
    >>> params = {"w": jnp.ones(2), "head": jnp.ones(3)}
    >>> tx, state, new, dropped = carry_over(tx, state, params)
    >>> print(new, dropped)
    ('head',) ('old',)
    >>> updates, state = tx.update(params, state, params)
    >>> print(updates["head"].round(3))
    [-0.1 -0.1 -0.1]
    """
    check_transformation("carry_over: the first argument", tx)
    check_swapped("carry_over(tx, state, params)", state, params)
    check_inexact(params, "carry_over: params")
    before: dict[str, tuple[int, ...] | None] = {}  # None where it is masked
    for node in moment_states("carry_over: state", state):
        for field in leaf_fields(node):
            for path, leaf in leaves_by_path(getattr(node, field)).items():
                before[path] = before.get(path) if leaf is None else leaf.shape
    leaves = leaves_by_path(params)
    now = {path: np.shape(leaf) for path, leaf in leaves.items() if leaf is not None}
    new = tuple(p for p in now if p not in before or before[p] not in (None, now[p]))
    dropped = tuple(p for p in before if before[p] is not None and now.get(p) != before[p])
    if one_count or not new:
        return CarriedOver(tx, _filled(tx.init(params), state, new, dropped), new, dropped)
    # A run that grows again: `tx` knows only the leaves that it was made for.
    second = late or getattr(getattr(tx.update, "__self__", None), "late", None) or tx
    groups = {path: int(path in new) for path in now}
    both = _Groups(groups, [tx, second], one_rate=late is None, late=second)
    others, begun = both.init(params)
    state = _filled(others, state, (), dropped), begun
    return CarriedOver(GradientTransformation(both.init, both.update), state, new, dropped)


def by_group(
    groups: Mapping[str, int], transformations: Sequence[Transformation], *, one_rate: bool = False
) -> GradientTransformation:
    """Applies to each leaf the transformation of its group.

    Args:
      groups: for each leaf, by its path, the index of its transformation.
      transformations: one for each group. The state is the tuple of theirs, each of the whole
        tree's structure with None at the leaves of the others.
      one_rate: whether all take the learning rate that the first one takes.
    """
    made = _Groups(groups, transformations, one_rate)
    return GradientTransformation(made.init, made.update)


@dataclass(eq=False)
class _Groups:
    """Several transformations side by side, each for some leaves."""

    groups: Mapping[str, int]
    transformations: Sequence[Transformation]
    one_rate: bool
    late: Transformation | None = None

    def init(self, params: PyTree) -> PyTree:
        return tuple(
            tx.init(self._chosen(params, group)) for group, tx in enumerate(self.transformations)
        )

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        expected = len(self.transformations)
        if not isinstance(state, tuple) or len(cast("tuple[Any]", state)) != expected:
            raise TypeError(
                f"by_group: found {described(state)} as the state; expected a tuple of {expected},"
                " one part for each group."
                f" {way_out(None if isinstance(state, tuple) else state, 'transformation')}"
            )
        moved, next_state = list[PyTree](), list[PyTree]()
        for group, (tx, part) in enumerate(zip(self.transformations, state, strict=True)):
            chosen, ps = self._chosen(updates, group), self._chosen(params, group)
            us, part = tx.update(chosen, part, ps, **extra)
            moved.append(us)
            next_state.append(part)
            remembered = jax.tree.leaves_with_path(part) if self.one_rate and group == 0 else []
            for path, rate in remembered:
                if path and getattr(path[-1], "name", None) == "learning_rate":
                    extra = {"learning_rate": rate, **extra}
        merged = jax.tree.map(lambda _, *us: next(u for u in us if u is not None), updates, *moved)
        return merged, tuple(next_state)

    def _chosen(self, tree: PyTree, group: int) -> PyTree:
        def leaf_of(path: Any, leaf: Any) -> Any:
            if path_name(path) not in self.groups:
                raise ValueError(
                    f"by_group: found a leaf at {path_name(path)}, which has no group; expected"
                    f" {', '.join(self.groups)}. Pass the tree that the state was made for."
                )
            return leaf if self.groups[path_name(path)] == group else None

        return jax.tree.map_with_path(leaf_of, tree)


def _filled(like: PyTree, state: PyTree, new: Collection[str], dropped: Collection[str]) -> PyTree:
    """`like` with the values of a state, except for new and dropped leaves."""
    old, filled = _named(state), list[Any]()
    wrong: list[tuple[str, Any, Any]] = []
    for name, (owner, leaf) in _named(like).items():
        _, found = old.pop(name, (None, None))
        late = _belongs(name, owner, new)
        carried = not (owner and late) and found is not None and described(found) == described(leaf)
        filled.append(found if carried else leaf)
        wrong += [] if carried or late else [(name, found, leaf)]
    wrong += [(k, leaf, None) for k, (p, leaf) in old.items() if not _belongs(k, p, dropped)]
    for name, found, expected in wrong:
        raise ValueError(
            f"carry_over: at {name} the state has {described(found)}; expected"
            f" {described(expected)}. Pass the transformation that made the state."
            " adamfn.interop.convert moves moments to another format."
        )
    return jax.tree.unflatten(jax.tree.structure(like), filled)


def _belongs(name: str, owner: str | None, paths: Collection[str]) -> bool:
    """Whether an array of a state belongs to one of some leaves."""
    if owner is not None:
        return owner in [path or "leaf" for path in paths]
    # Other transformations keep trees of the parameters' structure under names of their own.
    return any(f"/{name}".endswith(f"/{path}") for path in paths)


def _named(state: PyTree) -> dict[str, tuple[str | None, Any]]:
    """Every array of a state by its path, and the `scales_key` of its leaf if it is of moments."""
    named: dict[str, tuple[str | None, Any]] = {}
    for where, node in jax.tree.leaves_with_path(state, is_leaf=holds_moments):
        fields = leaf_fields(node) if holds_moments(node) else []
        for path, leaf in jax.tree.leaves_with_path(node):
            field = path[0].name if fields else None
            owner = scales_key(path[1:]) if field in fields else None
            if field == "scales" and path[1:]:
                owner = path[1].key
            named[path_name((*where, *path))] = owner, leaf
    return named
