"""`carry_over`: a run whose model got other parameters."""

from collections.abc import Collection
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from adamfn.chains.transform import Transformation, check_transformation
from adamfn.formats.arrangement import holds_moments, kept_leaves, leaf_fields
from adamfn.interop.groups import by_group
from adamfn.interop.states import leaves_by_path, moment_states
from adamfn.trees import PyTree, check_inexact, describe, path_name

_CALLER = "carry_over"


class CarriedOver(NamedTuple):
    """What goes on with the new parameters."""

    tx: Transformation
    state: PyTree
    new: tuple[str, ...]
    """Paths of parameters whose moments begin at zero: added ones, and those of another shape."""
    dropped: tuple[str, ...]
    """Paths whose moments have no place any more: removed ones, and those of another shape."""


def carry_over(
    tx: Transformation,
    state: PyTree,
    params: PyTree,
    *,
    one_count: bool = False,
    late: Transformation | None = None,
) -> CarriedOver:
    r"""Goes on with a run after parameters were added or removed.

    What is kept of a parameter that is still there, under its path and of its shape, is carried
    over to the bit, in any format. The others begin afresh.

    As in torch, each late parameter is corrected for the steps that it has taken itself: its first
    step is one rate long. To that end the late ones get a transformation of their own, and the
    state becomes a pair, whose `step` is an `update` and a sum, not one pass. They follow the rate
    that the others take, a schedule's too. With `one_count`, `tx` and the arrangement of its state
    stay as they are. Then a late parameter's moments are corrected as if they had seen all t steps,
    and its first step is

    $$ \frac{1 - b_1}{\sqrt{1 - b_2}} \cdot \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} $$

    rates long: up to 3.2 with the default decays. A warmup, or a smaller rate, hides that.

    Args:
      tx: the run's transformation: any that keeps moments, in wrappers too. Masks and labels that
        it was given are to fit the new parameters; a function does.
      state: its state for the old parameters.
      params: the new parameters: any pytree of floating-point arrays.
      one_count: whether late parameters share the count of the others.
      late: the transformation of the late ones, with a rate of its own; None for that of the
        others. What `from_state_dict` made of several groups needs one.

    Returns:
      A `CarriedOver`: the transformation and the state that go on, and what is new and dropped.

    Raises:
      TypeError, ValueError: a state without moments, a packed one, or one that is not of `tx`.

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
    check_transformation(f"{_CALLER}: the first argument", tx)
    check_inexact(params, f"{_CALLER}: params")
    before = _shapes(state)
    leaves = leaves_by_path(params)
    now = {path: np.shape(leaf) for path, leaf in leaves.items() if leaf is not None}
    new = tuple(p for p in now if p not in before or before[p] not in (None, now[p]))
    dropped = tuple(p for p in before if before[p] is not None and now.get(p) != before[p])
    if one_count or not new:
        return CarriedOver(tx, _filled(tx.init(params), state, new, dropped), new, dropped)
    groups = {path: int(path in new) for path in now}
    # A run that grows again: its transformation knows its own leaves alone.
    second = late or getattr(tx.update, "late", tx)
    both = by_group(groups, [tx, second], one_rate=late is None)
    cast("Any", both.update).late = second
    others, begun = both.init(params)
    return CarriedOver(both, (_filled(others, state, (), dropped), begun), new, dropped)


def _shapes(state: PyTree) -> dict[str, tuple[int, ...] | None]:
    """The shape of every leaf that a state knows, by its path; None if it is masked."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for node in moment_states(f"{_CALLER}: state", state):
        for path, leaf in jax.tree.leaves_with_path(node.mu, is_leaf=_is_masked):
            if _is_masked(leaf):
                shapes.setdefault(path_name(path), None)
        for leaf in kept_leaves(node):
            part = next(part for part in leaf.parts.values() if part is not None)
            shapes[path_name(leaf.path)] = part.shape
    return shapes


def _filled(like: PyTree, state: PyTree, new: Collection[str], dropped: Collection[str]) -> PyTree:
    """`like` with all of a state but what is kept of other leaves."""
    names, leaves = _named(state), jax.tree.leaves(state)
    found = dict(zip((name for name, _ in names), leaves, strict=True))
    filled: list[Any] = []
    for (name, owner), leaf in zip(_named(like), jax.tree.leaves(like), strict=True):
        old = found.pop(name, None)
        carried = owner not in new and old is not None and describe(old) == describe(leaf)
        if not carried and not _is_of(name, owner, new):
            raise ValueError(
                f"{_CALLER}: at {name} the state has {describe(old)}; expected {describe(leaf)}."
                " Pass the transformation that made the state: adamfn.interop.convert moves its"
                " moments to another format."
            )
        filled.append(old if carried else leaf)
    for name, owner in names:
        if name in found and not _is_of(name, owner, dropped):
            raise ValueError(
                f"{_CALLER}: the state has {describe(found[name])} at {name}, for which the"
                " transformation has no place. Pass the transformation that made the state."
            )
    return jax.tree.unflatten(jax.tree.structure(like), filled)


def _is_of(name: str, owner: str | None, paths: Collection[str]) -> bool:
    """Whether an array of a state is kept of one of some leaves."""
    if owner is not None:
        return owner in paths
    # Other transformations keep trees of the parameters' structure under names of their own.
    return any(name == path or name.endswith(f"/{path}") for path in paths)


def _named(state: PyTree) -> list[tuple[str, str | None]]:
    """A name for every array of a state, and the leaf of which states of moments keep it.

    Scales are listed by the leaf's number, which changes with the tree: they get its path instead.
    """
    named: list[tuple[str, str | None]] = []
    nodes: list[tuple[Any, Any]] = jax.tree.leaves_with_path(state, is_leaf=holds_moments)
    for where, node in nodes:
        if not holds_moments(node):
            named.append((path_name(where), None))
            continue
        owners = [leaf.path for leaf in kept_leaves(node)]
        for (field, *rest), _ in jax.tree.leaves_with_path(node):
            own: Any = rest if field.name in leaf_fields(node) else None
            if field.name == "scales" and rest:
                own = owners[rest[0].idx]
                rest = [*own, *rest[1:]]
            name = path_name((*where, field, *rest))
            named.append((name, None if own is None else path_name(own)))
    return named


def _is_masked(leaf: Any) -> bool:
    return type(leaf).__name__ == "MaskedNode"
