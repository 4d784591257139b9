# SPDX-License-Identifier: Apache-2.0
"""The trees of a run of stages, leaf by leaf: parameters, gradients and states."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.backends.calls import Step
from adamfn.backends.primitive import Backend
from adamfn.backends.shards import split_of
from adamfn.core.averages import Decays, increment
from adamfn.core.leaf import Leaf, as_fields, check_corrections, first_fields, kept_by_leaf
from adamfn.core.masks import broadcast_mask
from adamfn.core.placement import Path, Shards, with_type_of
from adamfn.core.stage import Stage, counted
from adamfn.formats import choose_formats
from adamfn.trees import (
    PyTree,
    as_array,
    check_inexact,
    check_values,
    described,
    holds_state,
    matching_leaves,
)


class Request(NamedTuple):
    """What a step is to return, and its inputs besides gradients and state."""

    params: PyTree
    """The parameters; None if `update` got none."""
    extra: Mapping[str, Any]
    """The extra arguments of `update`."""
    updates: bool = True
    """Whether to return the updates."""
    moves: bool = False
    """Whether to return the moved parameters."""
    decays: Decays | None = None
    """Those of the last moments in earlier runs of the chain, if there are any."""
    backend: Backend = "auto"
    shards: Mapping[Path, Shards] | None = None
    """How leaves are split, by path; None to take it from their types."""


def check_call(call: str, updates: PyTree, state: PyTree, params: PyTree) -> None:
    """Raises TypeError if arguments of a `call` are swapped, or one has shapes without values."""
    caller = call.split("(")[0]
    for name, tree in (("gradients", updates), ("params", params)):
        if holds_state(tree):
            raise TypeError(f"{caller}: found a state in the place of {name}; expected {call}.")
    check_values(caller, updates=updates, state=state, params=params)


def first_states(stages: Sequence[Stage], params: PyTree) -> list[PyTree]:
    """The states of a run before the first step. Raises as `check_inexact`."""
    check_inexact(params, f"{stages[0].name}: params")
    states: list[PyTree] = []
    for place, stage in enumerate(stages):
        kind = stage.states[0] if None not in stage.start.values() else stage.states[1]
        fields: dict[str, Any] = {}
        if kind is stage.state:
            if stage.mask is not None and jax.tree.leaves(params):
                broadcast_mask(stage.name, stage.mask, params)  # mistakes show before a step
            fields = first_fields(stage, params)
            fields |= {name: make() for name, make in stage.start.items() if make}
        if place == 0 and not any(other.counts for other in stages):
            kind = counted(kind)
        if "count" in kind._fields:
            fields["count"] = jnp.zeros((), jnp.int32)
        states.append(kind(**fields))
    return states


def next_count(stages: Sequence[Stage], states: Sequence[PyTree]) -> jax.Array:
    """The count of the step to come, 1 at the first; TypeError if a state has the wrong type."""
    counting = [place for place, state in enumerate(states) if has_field(state, "count")]
    for place, (stage, state) in enumerate(zip(stages, states, strict=True)):
        kinds = [kind for kind in stage.states if counting or place or has_field(kind, "count")]
        if not isinstance(state, tuple(kinds)):
            raise TypeError(
                f"{stage.name}: found a state of type {type(state).__name__}, expected"
                f" {kinds[0].__name__}. {way_out(state, 'transformation')}"
            )
    count: Any = states[counting[0]].count
    count = jnp.asarray(count) if isinstance(count, int) else as_array(count)
    if described(count) != "int32[]":
        raise TypeError(
            f"{stages[counting[0]].name}: the state's count is {described(count)}; expected"
            " int32[]. Pass the state that `update` returned, or restore into tx.init(params)."
        )
    return increment(count)


def leaves_of(
    stages: Sequence[Stage], updates: PyTree, states: Sequence[PyTree], request: Request
) -> list[Leaf]:
    """Every leaf of a run with its state."""
    check_inexact(updates, f"{stages[0].name}: updates")
    ps = _params_of(stages, updates, request)
    pairs = zip(jax.tree.leaves_with_path(updates), ps, strict=True)
    leaves = [Leaf(path, index, as_array(u), p) for index, ((path, u), p) in enumerate(pairs)]
    masks = masks_of(stages, updates, request.params)
    # A format holds a parameter, as at `init`, whatever dtype its gradient has.
    held = jax.tree.structure(updates).unflatten([leaf.held for leaf in leaves])
    for stage, state, mask in zip(stages, states, masks, strict=True):
        formats = choose_formats(stage.moments, held)
        kept = kept_by_leaf(stage, state, updates, formats)
        for leaf, format, row, active in zip(leaves, formats, kept, mask, strict=True):
            leaf.formats.append(format)
            leaf.kept.append(row)
            leaf.active.append(active)
    counts = [getattr(state, "count", None) for state in states]
    reads = request.moves or any("params" in stage.reads for stage in stages)
    for leaf in leaves:
        leaf.shards = split_of(leaf, request.shards)
        param, state = leaf.param if reads else None, (leaf.kept, counts)
        arrays = {"gradient": leaf.grad, "parameter": param, "state": state}
        places: dict[Any, str] = {}
        if not isinstance(leaf.grad, Tracer):
            places = devices_of(arrays)
        elif leaf.shards is not None and request.shards is None and any(leaf.shards.axes):
            rows = [row for stage, row in zip(stages, leaf.kept, strict=True) if stage.elementwise]
            places = _meshes_of(arrays | {"state": rows}, leaf.grad.shape)
        if len(places) > 1:
            (here, what), (there, other), *_ = places.items()
            raise ValueError(
                f"{stages[0].name}: at {leaf.name} the {what} is on {_place(here)}, and the {other}"
                f" on {_place(there)}; expected the same. Move one, such as the state:"
                " jax.device_put(state, adamfn.sharding.state_shardings(tx, params, shardings))."
            )
    for place, stage in enumerate(stages):
        check_corrections(stage, place, leaves)
    return leaves


def devices_of(trees: Mapping[str, PyTree]) -> dict[frozenset[Any], str]:
    """The sets of devices on which arrays are outside `jit`, each with the first tree there."""
    found: dict[frozenset[Any], str] = {}
    for name, tree in trees.items():
        for x in jax.tree.leaves(tree):
            if not isinstance(x, Tracer) and getattr(x, "committed", False):
                found.setdefault(frozenset(x.sharding.device_set), name)
    return found


def _meshes_of(trees: Mapping[str, PyTree], shape: Any) -> dict[Any, str]:
    """The same under `jit`, where types name explicit axes of a mesh, of arrays with a shape."""
    arrays = [(name, x) for name, tree in trees.items() for x in jax.tree.leaves(tree)]
    found = [(jax.typeof(x).sharding.mesh, name) for name, x in arrays if x.shape == shape]
    return dict(reversed(found))


def _place(place: Any) -> str:
    if isinstance(place, frozenset):
        return f"{len(place)} devices ({min(map(str, place))} first)"
    return f"a mesh of {dict(place.shape)}" if place.shape else "no mesh"


def masks_of(stages: Sequence[Stage], updates: PyTree, params: PyTree) -> list[list[bool]]:
    """Of each stage, whether it changes each leaf."""
    whole, number = updates if params is None else params, len(jax.tree.leaves(updates))
    return [
        [True] * number if stage.mask is None else broadcast_mask(stage.name, stage.mask, whole)
        for stage in stages
    ]


def next_states(step: Step, leaves: Sequence[Leaf], treedef: Any) -> list[PyTree]:
    """The states after a step, with the types that they had before."""
    paths, found = [leaf.path for leaf in leaves], list[PyTree]()
    for place, (stage, state) in enumerate(zip(step.stages, step.states, strict=True)):
        new = {**step.remembered[place]}
        if "count" in state._fields:
            new["count"] = increment(state.count)
        always = {*new} - {"count"} if "taken" in new else ()  # a gate remembers skipped steps
        if step.gate is not None:
            held = {name: getattr(state, name) for name in new if name not in always}
            new |= {name: jnp.where(step.gate, new[name], old) for name, old in held.items()}
        fields = {name: with_type_of(x, getattr(state, name)) for name, x in new.items()}
        if stage.keeps:
            fields |= as_fields(stage, [leaf.kept[place] for leaf in leaves], treedef, paths)
        found.append(state._replace(**fields))
    return found


def has_field(node: Any, field: str) -> bool:
    """True for a named tuple with this field; every tuple has a method `count`."""
    return field in getattr(node, "_fields", ())


def kept_by_path(field: str, state: PyTree) -> dict[Any, Any]:
    """What all named tuples in a state keep in a field, by the paths of leaves."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: has_field(node, field))
    trees = [getattr(node, field) for node in nodes if has_field(node, field)]
    return {path: x for tree in trees for path, x in jax.tree.leaves_with_path(tree)}


def way_out(state: Any, owner: str) -> str:
    """The end of an error's message: what to do about a state that is not its owner's."""
    if isinstance(state, Mapping | list) or type(state) is tuple:
        return (
            "If it was restored into plain containers, call adamfn.interop.restore(state,"
            f" into=tx.init(params)); if it is of another {owner}, make it with this one's"
            " init(params)."
        )
    return f"The state belongs to another {owner}: make it with this one's init(params)."


def _params_of(stages: Sequence[Stage], updates: PyTree, request: Request) -> list[Any]:
    """The parameter of every leaf; None if nothing reads them."""
    params, moves = request.params, request.moves
    readers = [stage.name for stage in stages if {"params", "new_params"} & {*stage.reads}]
    name, number = (readers or [stages[0].name])[0], len(jax.tree.leaves(updates))
    if params is None and updates is not None and (readers or moves):
        raise ValueError(
            f"{name}: update got no params, and it needs them. Call update(updates, state, params)."
        )
    if params is None or not (readers or moves):  # read for their dtype alone
        leaves = [*map(as_array, jax.tree.leaves(params))]
        return leaves if len(leaves) == number else [None] * number
    way_out = "Pass the parameters that the gradients are of."
    leaves = matching_leaves(f"{name}: updates", updates, "params", params, way_out)
    return [*map(as_array, leaves)]
