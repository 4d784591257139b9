"""`carry_over`: a run whose model got other parameters."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from adamfn.chains.leaves import way_out
from adamfn.chains.transform import GradientTransformation, Transformation, check_transformation
from adamfn.formats.arrangement import holds_moments, kept_leaves, leaf_fields, scales_key
from adamfn.interop.states import is_placeholder, leaves_by_path, moment_states
from adamfn.trees import PyTree, check_inexact, describe, path_name


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
    r"""Continues a run after parameters were added or removed.

    The state of a parameter with the same path and shape is carried over to the bit, in any format.
    The others begin at zero.

    As in torch, each late parameter is corrected for the steps that it has taken itself: its first
    step is one rate long. For this, late parameters get a transformation of their own, and the
    state becomes a pair, whose `step` is an `update` and a sum, not one pass. They follow the rate
    of the others, also a schedule. With `one_count`, `tx` and the structure of its state stay as
    they are. A late parameter is then corrected as if it had taken all t steps, and its first step
    is

    $$ \frac{1 - b_1}{\sqrt{1 - b_2}} \cdot \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} $$

    rates long: up to 3.2 with the default decays. A warmup or a smaller rate hides that.

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

    >>> import adamfn
    >>> import jax.numpy as jnp
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
    check_inexact(params, "carry_over: params")
    before = _shapes(state)
    leaves = leaves_by_path(params)
    now = {path: np.shape(leaf) for path, leaf in leaves.items() if leaf is not None}
    new = tuple(p for p in now if p not in before or before[p] not in (None, now[p]))
    dropped = tuple(p for p in before if before[p] is not None and now.get(p) != before[p])
    if one_count or not new:
        return CarriedOver(tx, _filled(tx.init(params), state, new, dropped), new, dropped)
    second = late or tx
    groups = getattr(tx.update, "__self__", None)
    if late is None and isinstance(groups, _Groups) and groups.late is not None:
        second = groups.late  # a run that grows again: `tx` knows only the leaves it was made for
    late_or_not = {path: int(path in new) for path in now}
    both = _Groups(late_or_not, [tx, second], one_rate=late is None, late=second)
    others, begun = both.init(params)
    state = _filled(others, state, (), dropped), begun
    return CarriedOver(GradientTransformation(both.init, both.update), state, new, dropped)


def by_group(
    groups: Mapping[str, int],
    transformations: Sequence[Transformation],
    *,
    one_rate: bool = False,
) -> GradientTransformation:
    """Applies to each leaf the transformation of its group.

    Args:
      groups: for each leaf, by its path, the index of its transformation.
      transformations: one for each group.
      one_rate: whether all take the learning rate that the first one takes.

    Returns:
      A `GradientTransformation` whose state is the tuple of theirs. Each has the whole tree's
      structure, with None at the leaves of the others.
    """
    made = _Groups(groups, transformations, one_rate)
    return GradientTransformation(made.init, made.update)


class _Groups:
    """Several transformations side by side, each for some leaves."""

    def __init__(
        self,
        groups: Mapping[str, int],
        transformations: Sequence[Transformation],
        one_rate: bool,
        late: Transformation | None = None,
    ) -> None:
        self._groups, self._transformations, self._one_rate = groups, transformations, one_rate
        self.late = late

    def init(self, params: PyTree) -> PyTree:
        return tuple(
            tx.init(self._chosen(params, group)) for group, tx in enumerate(self._transformations)
        )

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        expected = len(self._transformations)
        if not isinstance(state, tuple) or len(cast("tuple[Any]", state)) != expected:
            raise TypeError(
                f"by_group: found a state of type {type(state).__name__}; expected a tuple of"
                f" {expected}, one part for each group."
                f" {way_out(None if isinstance(state, tuple) else state, 'transformation')}"
            )
        next_state: list[PyTree] = []
        found: dict[str, Any] = {}
        for group, (tx, part) in enumerate(zip(self._transformations, state, strict=True)):
            chosen, ps = self._chosen(updates, group), self._chosen(params, group)
            moved, part = tx.update(chosen, part, ps, **extra)
            found |= {path: u for path, u in leaves_by_path(moved).items() if u is not None}
            next_state.append(part)
            if self._one_rate and group == 0:
                extra = _rate_in(part) | extra
        merged = jax.tree.map_with_path(lambda path, _: found[path_name(path)], updates)
        return merged, tuple(next_state)

    def _chosen(self, tree: PyTree, group: int) -> PyTree:
        def leaf_of(path: Any, leaf: Any) -> Any:
            name = path_name(path)
            if name not in self._groups:
                raise ValueError(
                    f"by_group: found a leaf at {name}, which has no group; expected"
                    f" {', '.join(self._groups)}. Pass the tree that the state was made for."
                )
            return leaf if self._groups[name] == group else None

        return jax.tree.map_with_path(leaf_of, tree)


def _rate_in(state: PyTree) -> dict[str, Any]:
    """The learning rate that a state remembers, as an argument; empty if it remembers none."""
    nodes = jax.tree.leaves(state, is_leaf=_remembers_rate)
    rates = [node.learning_rate for node in nodes if _remembers_rate(node)]
    return {"learning_rate": rates[0]} if rates else {}


def _remembers_rate(node: Any) -> bool:
    return "learning_rate" in getattr(node, "_fields", ())


def _shapes(state: PyTree) -> dict[str, tuple[int, ...] | None]:
    """The shape of every leaf that a state knows, by its path; None if it is masked."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for node in moment_states("carry_over: state", state):
        for path, leaf in jax.tree.leaves_with_path(node.mu, is_leaf=is_placeholder):
            if is_placeholder(leaf):
                shapes.setdefault(path_name(path), None)
        for path, parts, _ in kept_leaves(node):
            shapes[path_name(path)] = next(x for x in parts.values() if x is not None).shape
    return shapes


def _filled(like: PyTree, state: PyTree, new: Collection[str], dropped: Collection[str]) -> PyTree:
    """`like` with the values of a state, except for new and dropped leaves."""
    named = _named(state)
    found = {name: leaf for name, _, leaf in named}
    filled: list[Any] = []
    for name, owner, leaf in _named(like):
        old = found.pop(name, None)
        carried = owner not in new and old is not None and describe(old) == describe(leaf)
        if not carried and not _belongs(name, owner, new):
            raise ValueError(
                f"carry_over: at {name} the state has {describe(old)}; expected {describe(leaf)}."
                " Pass the transformation that made the state. adamfn.interop.convert moves moments"
                " to another format."
            )
        filled.append(old if carried else leaf)
    for name, owner, leaf in named:
        if name in found and not _belongs(name, owner, dropped):
            raise ValueError(
                f"carry_over: the state has {describe(leaf)} at {name}, for which the"
                " transformation has no place. Pass the transformation that made the state."
            )
    return jax.tree.unflatten(jax.tree.structure(like), filled)


def _belongs(name: str, owner: str | None, paths: Collection[str]) -> bool:
    """Whether an array of a state belongs to one of some leaves."""
    if owner is not None:
        return owner in paths
    # Other transformations keep trees of the parameters' structure under names of their own.
    return any(name == path or name.endswith(f"/{path}") for path in paths)


def _named(state: PyTree) -> list[tuple[str, str | None, Any]]:
    """Every array of a state with its path, and the path of its leaf if it is of moments."""
    named: list[tuple[str, str | None, Any]] = []
    nodes: list[tuple[Any, Any]] = jax.tree.leaves_with_path(state, is_leaf=holds_moments)
    for where, node in nodes:
        if not holds_moments(node):
            named.append((path_name(where), None, node))
            continue
        owners = {scales_key(path): path_name(path) for path, *_ in kept_leaves(node)}
        fields = leaf_fields(node)
        for (field, *rest), leaf in jax.tree.leaves_with_path(node):
            owner = path_name(tuple(rest)) if field.name in fields else None
            if field.name == "scales" and rest:
                owner = owners[rest[0].key]
            named.append((path_name((*where, field, *rest)), owner, leaf))
    return named
