"""Runs of stages over a tree: their states, their scalars, and one fused program for each leaf.

A run is all neighbouring adamfn stages of a chain. It is cut into segments: a stage that is not
elementwise is a segment by itself, and the stages between two such are one. The states, the count,
the scalars and the gate are those of the run.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise, starmap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.backends.calls import Step, run_leaves, together
from adamfn.backends.primitive import Backend
from adamfn.backends.shards import split_of
from adamfn.core.averages import increment
from adamfn.core.leaf import Leaf, as_fields, check_corrections, first_fields, kept_by_leaf
from adamfn.core.masks import broadcast_mask
from adamfn.core.placement import Path, Shards
from adamfn.core.program import Part, Program
from adamfn.core.stage import Stage, counted
from adamfn.core.varying import with_type_of
from adamfn.core.weights import Weights
from adamfn.formats import Format, choose_formats
from adamfn.trees import (
    PyTree,
    as_array,
    check_inexact,
    describe,
    matching_leaves,
    wide_dtype,
)


class Wanted(NamedTuple):
    """What a run returns, by which backend, and on which devices."""

    updates: bool = True
    params: bool = False
    backend: Backend = "auto"
    shards: Mapping[Path, Shards] | None = None
    """How leaves are split, by path; None to take it from their types."""


def first_states(stages: Sequence[Stage], params: PyTree) -> list[PyTree]:
    """The states of a run before the first step.

    Raises:
      TypeError: a leaf is not an array of floating-point or complex numbers.
    """
    check_inexact(params, f"{stages[0].name}: params")
    states: list[PyTree] = []
    for place, stage in enumerate(stages):
        kind = stage.states[0] if None not in stage.start.values() else stage.states[1]
        fields: dict[str, Any] = {}
        if kind is stage.state:
            if callable(stage.mask) and jax.tree.leaves(params):
                broadcast_mask(stage.name, stage.mask, params)  # mistakes show before a step
            fields = first_fields(stage, params)
            fields |= {name: make() for name, make in stage.start.items() if make}
        if place == 0 and not any(other.counts for other in stages):
            kind = counted(kind)
        if "count" in kind._fields:
            fields["count"] = jnp.zeros((), jnp.int32)
        states.append(kind(**fields))
    return states


def run(
    stages: Sequence[Stage],
    updates: PyTree,
    states: Sequence[PyTree],
    params: PyTree,
    extra: Mapping[str, Any],
    wanted: Wanted,
) -> tuple[PyTree, PyTree, list[PyTree]]:
    """One step of a run.

    Args:
      stages: the stages, at least one.
      updates: the gradients, or the updates of transformations before these.
      states: the stages' states.
      params: the parameters; None if no stage reads them and they are not moved.
      extra: the extra arguments of `update`.
      wanted: what to return, and by which backend.

    Returns:
      The updates and the moved parameters, None if not wanted, and the next states.

    Raises:
      TypeError, ValueError: trees or states that do not fit; names the stage and the leaf.
    """
    count = next_count(stages, states)
    leaves, treedef = leaves_of(stages, updates, states, params, wanted)
    extra = {**extra, "grads": [leaf.grad for leaf in leaves]}
    scalars, remembered = scalars_at(stages, states, count, extra)
    gates = [new["taken"] for new in remembered if "taken" in new]
    gate = jnp.all(jnp.stack(gates)) if gates else None
    step = Step(stages, scalars, gate, count, wanted.backend)
    segments = segments_of(stages)
    for segment in segments:
        if "mu" in stages[segment.start].keeps:
            for leaf in leaves:
                leaf.seen = leaf.update
        ends = Wanted() if segment is not segments[-1] else wanted
        made: dict[Any, Program] = {}
        programs: list[Program] = []
        for leaf in leaves:
            dtypes = leaf.dtype, leaf.grad.dtype, getattr(leaf.param, "dtype", None)
            key = dtypes, *leaf.active, *leaf.formats
            if key not in made:
                made[key] = program_of(step, segment, leaf, ends)
            programs.append(made[key])
        for program, places, own in together(step, programs, leaves, segment):
            run_leaves(step, program, places, own, last=segment is segments[-1])
    paths = [leaf.path for leaf in leaves]
    next_states: list[PyTree] = []
    for place, (stage, state) in enumerate(zip(stages, states, strict=True)):
        fields = as_fields(stage, [leaf.kept[place] for leaf in leaves], treedef, paths)
        new = {**remembered[place]}
        if "count" in state._fields:
            new["count"] = increment(state.count)
        if gate is not None:
            always = {*new} - {"count"} if "taken" in new else ()  # a gate remembers skipped steps
            held = {name: getattr(state, name) for name in new if name not in always}
            new |= {name: jnp.where(gate, new[name], x) for name, x in held.items()}
        known = {name: with_type_of(x, getattr(state, name)) for name, x in new.items()}
        next_states.append(state._replace(**(fields if stage.keeps else {}), **known))
    return (
        treedef.unflatten([leaf.update for leaf in leaves]) if wanted.updates else None,
        treedef.unflatten([leaf.param for leaf in leaves]) if wanted.params else None,
        next_states,
    )


def next_count(stages: Sequence[Stage], states: Sequence[PyTree]) -> jax.Array:
    """The count of the step to come, 1 at the first.

    Raises:
      TypeError: a state is of something else, or the count is no int32 scalar.
    """
    for stage, state in zip(stages, states, strict=True):
        if not isinstance(state, stage.states):
            raise TypeError(
                f"{stage.name}: found a state of type {type(state).__name__}, expected"
                f" {stage.state.__name__}. {way_out(state, 'transformation')}"
            )
    counting = [state for state in states if "count" in state._fields]
    if not counting:
        raise TypeError(
            f"{stages[0].name}: found a state of type {type(states[0]).__name__}, which has no"
            f" count; expected {counted(type(states[0])).__name__}."
            f" {way_out(None, 'transformation')}"
        )
    count: Any = counting[0].count
    count = jnp.asarray(count) if isinstance(count, int) else as_array(count)
    if describe(count) != "int32[]":
        raise TypeError(
            f"{stages[states.index(counting[0])].name}: the state's count is {describe(count)};"
            " expected int32[]. Pass the state that `update` returned, or restore into"
            " tx.init(params)."
        )
    return increment(count)


def leaves_of(
    stages: Sequence[Stage],
    updates: PyTree,
    states: Sequence[PyTree],
    params: PyTree,
    wanted: Wanted,
) -> tuple[list[Leaf], Any]:
    """Every leaf with its state, and the structure of their tree."""
    check_inexact(updates, f"{stages[0].name}: updates")
    flat, treedef = jax.tree.flatten_with_path(updates)
    ps = _params_of(stages, updates, params, wanted)
    masks = masks_of(stages, updates, params)
    leaves = [
        Leaf(path, index, as_array(g), p)
        for index, ((path, g), p) in enumerate(zip(flat, ps, strict=True))
    ]
    for stage, state, mask in zip(stages, states, masks, strict=True):
        formats = choose_formats(stage.moments, updates)
        kept = kept_by_leaf(stage, state, updates, formats)
        for leaf, format, row, active in zip(leaves, formats, kept, mask, strict=True):
            leaf.formats.append(format)
            leaf.kept.append(row)
            leaf.active.append(active)
    for leaf in leaves:
        leaf.shards = split_of(leaf, wanted.shards)
    if stages[-1].keeps:
        check_corrections(stages[-1], len(stages) - 1, leaves)
    return leaves, treedef


def masks_of(stages: Sequence[Stage], updates: PyTree, params: PyTree) -> list[list[bool]]:
    """Of each stage, whether it changes each leaf."""
    whole, number = updates if params is None else params, len(jax.tree.leaves(updates))
    return [
        [True] * number if stage.mask is None else broadcast_mask(stage.name, stage.mask, whole)
        for stage in stages
    ]


def scalars_at(
    stages: Sequence[Stage], states: Sequence[Any], count: jax.Array, extra: Mapping[str, Any]
) -> tuple[list[tuple[Any, ...]], list[Mapping[str, Any]]]:
    """The scalars of each stage at a step, and the values that its state remembers of it."""
    scalars: list[tuple[Any, ...]] = []
    remembered: list[Mapping[str, Any]] = []
    for stage, state in zip(stages, states, strict=True):
        match stage.scalars(count, state, extra):
            case (tuple() | list() as own, Mapping() as new):
                scalars.append(tuple(own))
                remembered.append({k: v for k, v in new.items() if k in state._fields})
            case result:
                raise TypeError(
                    f"{stage.name}: its scalars returned {result!r}; expected the formula's scalars"
                    " in a tuple, then the values to remember in a dictionary: (x, y), {}."
                )
        for scalar in jax.tree.leaves(scalars[-1]):
            if jnp.shape(scalar) != ():
                raise ValueError(
                    f"{stage.name}: found {describe(scalar)} among its scalars; expected numbers"
                    " and arrays without axes."
                )
    return scalars, remembered


def segments_of(stages: Sequence[Stage]) -> list[range]:
    """The places of the stages of each segment of a run.

    A segment begins at the moments if a stage of a later segment reads the gradient that they were
    given: that gradient is then in memory.
    """
    whole = [place for place, stage in enumerate(stages) if not stage.elementwise]
    cuts = {0, len(stages), *whole, *(place + 1 for place in whole)}
    for place, stage in enumerate(stages):
        moments = [k for k in range(place) if "mu" in stages[k].keeps]
        if "grads" in stage.reads and moments and any(moments[-1] < k <= place for k in whole):
            cuts.add(moments[-1])
    ends = sorted(cuts)
    return list(starmap(range, pairwise(ends)))


def program_of(step: Step, segment: range, leaf: Leaf, wanted: Wanted) -> Program:
    """The program of a leaf in a segment.

    Raises:
      ValueError: a stage reads moments that no stage before it keeps.
    """
    parts = {
        k: _part(step.stages[k], leaf.formats[k]) for k in range(segment.stop) if leaf.active[k]
    }
    own = {k: part for k, part in parts.items() if k in segment}
    known, given, given_grads = {"params", "grads", "noise"}, dict[int, Part](), False
    for part in own.values():
        for name in {*part.reads} - known:
            keepers = [k for k in parts if k < segment.start and name in parts[k].keeps]
            if not keepers:
                raise ValueError(
                    f"{part.name}: it reads {name}, which no stage of ours just before it keeps;"
                    " expected one that does, such as scale_by_moments, earlier in the same chain."
                )
            given[keepers[-1]] = parts[keepers[-1]]
        given_grads |= "grads" in part.reads and "mu" not in known and segment.start > 0
        known |= {*part.keeps}
    last = segment.stop == len(step.stages)
    rounds = last and own and isinstance([*own.values()][-1].formula, Weights)
    update_dtype = None
    if wanted.updates and not last:
        # Nothing is rounded between two segments.
        update_dtype = jnp.result_type(wide_dtype(leaf.grad.dtype), leaf.dtype)
    elif wanted.updates:
        update_dtype = leaf.dtype if rounds else update_dtype_of(leaf.grad, leaf.param)
    return Program(
        tuple(own.values()),
        jax.tree.structure(tuple(step.scalars[k] for k in own)),
        leaf.dtype,
        wanted.params,
        update_dtype,
        step.gate is not None,
        all(step.stages[k].elementwise for k in own),
        tuple(given.items()),
        given_grads,
    )


def _part(stage: Stage, format: Format | None) -> Part:
    return Part(stage.name, stage.formula, tuple(stage.reads), tuple(stage.keeps), format)


def update_dtype_of(grad: Any, param: Any) -> Any:
    """The gradient's dtype, but float32 where float16 would lose small updates of wider params."""
    if grad.dtype == jnp.float16 and getattr(param, "dtype", None) != jnp.float16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(grad.dtype)


def way_out(state: Any, owner: str) -> str:
    """The end of an error's message: what to do about a state that is not its owner's."""
    if isinstance(state, Mapping | list) or type(state) is tuple:
        return (
            "If it was restored into plain containers, call adamfn.interop.restore(state,"
            f" into=tx.init(params)); if it is of another {owner}, make it with this one's"
            " init(params)."
        )
    return f"The state belongs to another {owner}: make it with this one's init(params)."


def _params_of(
    stages: Sequence[Stage], updates: PyTree, params: PyTree, wanted: Wanted
) -> list[Any]:
    """The parameter of every leaf; None if nothing reads them."""
    readers = [
        stage.name
        for stage in stages
        if "params" in stage.reads or isinstance(stage.formula, Weights)
    ]
    number = len(jax.tree.leaves(updates))
    if params is None and updates is not None and (readers or wanted.params):
        raise ValueError(
            f"{readers[0] if readers else stages[0].name}: update got no params, and it needs"
            " them. Call update(updates, state, params)."
        )
    if params is None:
        return [None] * number
    if not (readers or wanted.params):  # read for their dtype alone
        leaves = jax.tree.leaves(params)
        return leaves if len(leaves) == number else [None] * number
    name = f"{(readers or [stages[0].name])[0]}: updates"
    way_out = "Pass the parameters that the gradients are of."
    return [as_array(leaf) for leaf in matching_leaves(name, updates, "params", params, way_out)]
