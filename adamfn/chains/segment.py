"""Joined stages over a tree: their states, and one program for each leaf."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.backends.primitive import Backend
from adamfn.backends.shards import Shards, split_leaves
from adamfn.chains import calls
from adamfn.chains.holding import held_back
from adamfn.core.averages import increment
from adamfn.core.layers import layers_of
from adamfn.core.leaf import as_fields, check_whole, first_kept, kept_by_leaf
from adamfn.core.masks import broadcast_mask
from adamfn.core.measures import measured
from adamfn.core.placement import Path
from adamfn.core.stage import CountedState, EmptyState, Scalars, Stage
from adamfn.core.varying import with_type_of
from adamfn.formats import choose_formats
from adamfn.trees import PyTree, as_array, check_inexact, describe, matching_leaves


class Wanted(NamedTuple):
    """What joined stages are to return, by which backend, and on which devices."""

    updates: bool = True
    params: bool = False
    backend: Backend = "auto"
    shards: Mapping[Path, Shards] | None = None
    """How leaves are split, by their paths; None to take it from their types."""


def first_states(stages: Sequence[Stage], params: PyTree) -> list[PyTree]:
    """The states of joined stages before the first step.

    Raises:
      TypeError: a leaf is not an array of floating-point or complex numbers.
    """
    check_inexact(params, f"{stages[0].name}: params")
    states: list[PyTree] = []
    for stage in stages:
        if None in stage.start.values():
            states.append(EmptyState())
            continue
        remembered = {name: make() for name, make in stage.start.items() if make}
        if callable(stage.mask) and jax.tree.leaves(params):
            broadcast_mask(stage.name, stage.mask, params)  # mistakes show before the first step
        fields = first_kept(stage, params) | remembered
        if "count" in stage.state._fields:
            fields["count"] = jnp.zeros((), jnp.int32)
        states.append(stage.state(**fields))
    if _first_that_counts(stages) is None:
        states[0] = CountedState(jnp.zeros((), jnp.int32), states[0])
    return states


def run(
    stages: Sequence[Stage],
    updates: PyTree,
    states: Sequence[PyTree],
    params: PyTree,
    extra: Mapping[str, Any],
    wanted: Wanted,
) -> tuple[PyTree, PyTree, list[PyTree]]:
    """One step of joined stages.

    Args:
      stages: the stages, at least one.
      updates: the gradients, or what transformations before these made of them.
      states: the stages' states.
      params: the parameters; None where no stage reads them and they are not to be moved.
      extra: the extra arguments of `update`.
      wanted: what to return, and by which backend.

    Returns:
      The updates and the parameters moved by them, None for what is not wanted, and the next
      states.

    Raises:
      TypeError, ValueError: trees or states that do not fit; names the stage and the leaf.
    """
    before = states
    count, states = count_of(stages, states)
    check_inexact(updates, f"{stages[0].name}: updates")
    leaves, treedef = jax.tree.flatten(updates)
    gs = [as_array(leaf) for leaf in leaves]
    ps = _params_of(stages, updates, params, len(gs), wanted)
    formats = [choose_formats(stage.moments, updates) for stage in stages]
    columns = [
        kept_by_leaf(stage, state, updates, own)
        for stage, state, own in zip(stages, states, formats, strict=True)
    ]
    kept: list[Any] = [list(row) for row in zip(*columns, strict=True)]
    masks = masks_of(stages, updates, params)
    check_whole(stages, masks, updates, kept)
    extra = measured(stages, leaves, extra)
    scalars, remembered = scalars_at(stages, states, count, extra)
    programs = calls.leaf_programs(
        stages,
        formats,
        masks,
        layers_of(stages, updates, params),
        scalars,
        gs,
        ps,
        kept,
        returns=wanted.updates,
        moves=wanted.params,
    )
    ps = [p if program.reads_params else None for p, program in zip(ps, programs, strict=True)]
    shards = split_leaves(wanted.shards, updates, programs, gs, ps, kept)
    kept, moved, next_ps = calls.run_all(
        programs, wanted.backend, scalars, count, kept, gs, ps, shards
    )
    next_states: list[PyTree] = []
    for place, (stage, state, own, new) in enumerate(
        zip(stages, states, formats, remembered, strict=True)
    ):
        fields = as_fields(stage, [row[place] for row in kept], treedef, own)
        next_states.append(state._replace(**fields, **remembered_as(state, new)))
    next_states = counted(stages, next_states, count)
    return (
        treedef.unflatten(moved) if wanted.updates else None,
        treedef.unflatten(next_ps) if wanted.params else None,
        held_back(stages, before, next_states, scalars),
    )


def count_of(stages: Sequence[Stage], states: Sequence[PyTree]) -> tuple[jax.Array, list[Any]]:
    """The count of the step to come, 1 at the first, and the stages' own states.

    Raises:
      TypeError: one of them is the state of something else, or the count is no int32 scalar.
    """
    own: list[Any] = list(states)
    first = _first_that_counts(stages)
    if first is None:
        check_state(stages[0], states[0], CountedState)
        own[0] = states[0].stage
    for stage, state in zip(stages, own, strict=True):
        check_state(stage, state, *stage.states)
    counting: Any = states[0] if first is None else own[first]
    count = counting.count
    count = jnp.asarray(count) if isinstance(count, int) else as_array(count)
    if describe(count) != "int32[]":
        raise TypeError(
            f"{stages[first or 0].name}: the state's count is {describe(count)}; expected int32[]."
            " Pass the state that `update` returned, or restore into tx.init(params)."
        )
    return increment(count), own


def scalars_at(
    stages: Sequence[Stage], states: Sequence[Any], count: jax.Array, extra: Mapping[str, Any]
) -> tuple[tuple[Any, ...], list[Mapping[str, Any]]]:
    """What the formulas need at a step, and what the states remember of it."""
    found: list[Scalars] = []
    for stage, state in zip(stages, states, strict=True):
        match stage.scalars(count, state, extra):
            case (tuple() | list() as own, Mapping() as remembered):
                found.append((own, remembered))
            case result:
                raise TypeError(
                    f"{stage.name}: its scalars returned {result!r}; expected the formula's scalars"
                    " in a tuple, then what to remember in a dictionary: (x, y), {}."
                )
        for scalar in jax.tree.leaves(found[-1][0]):
            if jnp.shape(scalar) != ():
                raise ValueError(
                    f"{stage.name}: found {describe(scalar)} among its scalars; expected numbers"
                    " and arrays without axes."
                )
    return tuple(tuple(own) for own, _ in found), [remembered for _, remembered in found]


def masks_of(stages: Sequence[Stage], updates: PyTree, params: PyTree) -> list[list[bool]]:
    """Of each stage, whether it changes each leaf."""
    whole = updates if params is None else params
    number = len(jax.tree.leaves(updates))
    return [
        [True] * number if stage.mask is None else broadcast_mask(stage.name, stage.mask, whole)
        for stage in stages
    ]


def remembered_as(state: Any, new: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What a state remembers, with the types that it had."""
    known = {name: value for name, value in new.items() if name in state._fields}
    return {name: with_type_of(value, getattr(state, name)) for name, value in known.items()}


def counted(stages: Sequence[Stage], states: list[Any], count: jax.Array) -> list[PyTree]:
    """Next states with their counts."""
    states = [
        state._replace(count=increment(state.count)) if "count" in state._fields else state
        for state in states
    ]
    if _first_that_counts(stages) is None:
        states[0] = CountedState(count, states[0])
    return states


def _first_that_counts(stages: Sequence[Stage]) -> int | None:
    return next((k for k, stage in enumerate(stages) if "count" in stage.state._fields), None)


def check_state(stage: Stage, state: Any, *expected: type[Any]) -> None:
    """Checks that a state is the one that its stage made.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(state, expected):
        raise TypeError(
            f"{stage.name}: found a state of type {type(state).__name__}, expected"
            f" {expected[0].__name__}. {way_out(state, 'transformation')}"
        )


def way_out(state: Any, owner: str) -> str:
    """The end of an error's message: what to do about a state that is not its owner's."""
    if isinstance(state, Mapping | list) or type(state) is tuple:
        return (
            "Restored in plain containers, it keeps its moments by adamfn.interop.restore(state,"
            f" into=tx.init(params)); of another {owner}, make it with this one's init(params)."
        )
    return f"The state belongs to another {owner}: make it with this one's init(params)."


def _params_of(
    stages: Sequence[Stage], updates: PyTree, params: PyTree, number: int, wanted: Wanted
) -> list[Any]:
    """The parameter of every leaf; None where nothing reads them."""
    readers = [stage.name for stage in stages if "params" in stage.reads]
    if params is None and updates is not None and (readers or wanted.params):
        raise ValueError(
            f"{readers[0] if readers else stages[0].name}: update got no params, and it needs"
            " them. Call update(updates, state, params)."
        )
    if params is None:
        return [None] * number
    name = f"{(readers or [stages[0].name])[0]}: updates"
    way_out = "Pass the parameters that the gradients are of."
    if not (readers or wanted.params):  # read for their dtype alone
        leaves = jax.tree.leaves(params)
        return leaves if len(leaves) == number else [None] * number
    return [as_array(leaf) for leaf in matching_leaves(name, updates, "params", params, way_out)]
