"""Packing: the float32 moments of many small leaves, end to end in a few buffers.

To pass an array into a compiled call and out again costs some microseconds, more than a step of
Adam on a thousand elements. So small leaves share buffers, up to 64 leaves each.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn import calls, joined
from adamfn.joined import Wanted
from adamfn.program import Call
from adamfn.stage import CountedState, Stage
from adamfn.transform import (
    GradientTransformation,
    Structure,
    assemble,
    elements,
    flat_states,
    nested,
    structure_of,
)
from adamfn.trees import PyTree, as_array, check_inexact, describe, matching_leaves, path_name

_LEAVES = 64
"""Leaves of one buffer. The time that XLA takes to compile a call grows with the square."""

_WAY_OUT = "Pass gradients of these parameters, and the state that `init` made for them."


class Packed(NamedTuple):
    """What is kept of a tree of parameters in one field of a state."""

    leaves: PyTree
    """What is kept of each leaf by itself: the parameters' tree, None where a leaf is packed."""
    buffers: Sequence[jax.Array]
    """Of the others, end to end: float32 of shape (elements,)."""


class _Packing(NamedTuple):
    """What `repack` needs to know of a packed transformation."""

    structure: Structure
    below: int

    @property
    def stages(self) -> list[Stage]:
        return list(elements(self.structure))

    def runs(self, params: PyTree) -> list[list[int]]:
        """The leaves that share each buffer, by their numbers: the same stages change them."""
        alike: dict[Any, list[int]] = {}
        masks = joined.masks_of(self.stages, params, params)
        for k, (leaf, *changed) in enumerate(zip(jax.tree.leaves(params), *masks, strict=True)):
            dtype = jnp.result_type(leaf)
            real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
            if real and jnp.size(leaf) < self.below:
                alike.setdefault(tuple(changed), []).append(k)
        return [own[i : i + _LEAVES] for own in alike.values() for i in range(0, len(own), _LEAVES)]


def packed(tx: GradientTransformation, below: int = 32768) -> GradientTransformation:
    """The same optimizer, with what it keeps of small leaves in shared buffers.

    A step of many small leaves is cheaper to trace and to run. Which leaves share a buffer follows
    from their shapes and dtypes, from the stages' masks and from `below`.

    Args:
      tx: a chain of ours with moments in float32, such as `adamw()`. What is not ours goes around
        it: `chain(optax.clip_by_global_norm(1.0), packed(adamw()))`.
      below: leaves of fewer elements are packed.

    Returns:
      A `GradientTransformation` that gives the same updates. Its state is that of `tx`, with a
      `Packed` in each field that is kept of leaves; `repack` moves one to the other. Libraries'
      states and checkpoints of other chains go by way of the plain one.

    Raises:
      ValueError: `tx` has parts that are not ours, moments in a format, or a stage that looks at a
        whole leaf; at `init`, parameters that are split over several devices.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.packed(adamfn.adam(0.1))
    >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    >>> state = tx.init(params)
    >>> print(state[0].mu.buffers[0].shape)
    (5,)
    >>> params, state = adamfn.step(tx, {"a": jnp.ones(2), "b": -jnp.ones(3)}, state, params)
    >>> print(params["a"].round(2), params["b"].round(2))
    [-0.1 -0.1] [0.1 0.1 0.1]
    """
    packing = _Packing(structure_of(tx), below)
    structure, stages = packing.structure, packing.stages
    for stage in stages:
        _check_packable(stage)

    def init(params: PyTree) -> PyTree:
        _check_whole(params)
        return _repacked(packing, joined.first_states(stages, params), params)

    def advance(
        updates: PyTree, state: PyTree, params: PyTree, extra: Mapping[str, Any], wanted: Wanted
    ) -> tuple[PyTree, PyTree, PyTree]:
        states = flat_states(structure, state)
        check_inexact(updates, "packed: updates")
        whole = updates
        if params is not None:
            matching_leaves("packed: updates", updates, "params", params, _WAY_OUT)
            whole = params
        runs = packing.runs(whole)
        _check_packed(stages, states, whole, runs)
        alone = _map_kept(stages, states, lambda _, field: field.leaves)
        rest, rest_params = _without(runs, updates), _without(runs, params)
        us, ps, alone = joined.run(stages, rest, alone, rest_params, extra, wanted)
        buffers, moved, next_ps = _run_packed(stages, runs, updates, states, params, extra, wanted)
        alone = _map_kept(stages, alone, lambda key, tree: Packed(tree, tuple(buffers[key])))
        treedef = jax.tree.structure(updates)
        return (
            _filled(treedef, us, moved) if wanted.updates else None,
            _filled(treedef, ps, next_ps) if wanted.params else None,
            nested(structure, iter(alone)),
        )

    made = assemble(init, advance, {name for stage in stages for name in stage.takes})
    cast("Any", made.update).packing = packing
    return made


def repack(tx: GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """Moves a plain state into the arrangement of a packed transformation, or the reverse.

    Args:
      tx: what `packed` returned.
      state: its state, or that of the chain that it was made of.
      params: the parameters, or arrays of their shapes.

    Returns:
      The state of the other, in which the run goes on.

    Raises:
      TypeError, ValueError: `tx` is not packed; a state of another chain or of other parameters.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones(3)}
    >>> chain = adamfn.adam()
    >>> _, state = chain.update(params, chain.init(params))
    >>> state = adamfn.repack(adamfn.packed(chain), state, params)
    >>> print(state[0].count, state[0].mu.buffers[0])
    1 [0.1 0.1 0.1]
    """
    packing = getattr(getattr(tx, "update", None), "packing", None)
    if not isinstance(packing, _Packing):
        raise TypeError(f"repack: the first argument is {tx!r}; expected what `packed` returned.")
    return _repacked(packing, flat_states(packing.structure, state), params)


def _repacked(packing: _Packing, states: Sequence[PyTree], params: PyTree) -> PyTree:
    """Packed states as plain ones, and plain ones as packed."""
    leaves, treedef = jax.tree.flatten(params)
    runs = packing.runs(params)
    packs = not any(isinstance(field, Packed) for field in _kept(packing.stages, states).values())
    if not packs:
        _check_packed(packing.stages, states, params, runs)

    def pack(key: Any, tree: PyTree) -> Packed:
        parts = matching_leaves("repack: params", params, key[1], tree, _WAY_OUT)
        flat = [jnp.concatenate([parts[k].reshape(-1) for k in run]) for run in runs]
        # One leaf instead of a tuple, as in storage.as_fields.
        return Packed(_without(runs, tree), tuple(flat) if leaves else jnp.zeros((0,)))

    def unpack(key: Any, field: Packed) -> PyTree:
        parts = treedef.flatten_up_to(field.leaves)
        for run, buffer in zip(runs, field.buffers, strict=True):
            ends = _ends(leaves, run)
            for k, end in zip(run, ends, strict=True):
                shape = jnp.shape(leaves[k])
                parts[k] = buffer[end - math.prod(shape) : end].reshape(shape)
        return treedef.unflatten(parts)

    moved = _map_kept(packing.stages, states, pack if packs else unpack)
    return nested(packing.structure, iter(moved))


def _run_packed(
    stages: Sequence[Stage],
    runs: Sequence[Sequence[int]],
    updates: PyTree,
    states: Sequence[Any],
    params: PyTree,
    extra: Mapping[str, Any],
    wanted: Wanted,
) -> tuple[dict[Any, list[jax.Array]], dict[int, jax.Array], dict[int, jax.Array]]:
    """The next buffers of each field, and the updates and parameters of the packed leaves."""
    gs = [as_array(leaf) for leaf in jax.tree.leaves(updates)]
    ps = [None] * len(gs) if params is None else [*map(as_array, jax.tree.leaves(params))]
    buffers = {key: field.buffers for key, field in _kept(stages, states).items()}
    count, own = joined.count_of(stages, states)
    scalars, _ = joined.scalars_at(stages, own, count, extra)
    programs = calls.leaf_programs(
        stages,
        [[None] * len(gs)] * len(stages),
        joined.masks_of(stages, updates, params),
        scalars,
        gs,
        ps,
        [()] * len(gs),
        returns=wanted.updates,
        moves=wanted.params,
    )
    vectors = calls.Vectors(scalars)
    next_buffers: dict[Any, list[jax.Array]] = {key: [] for key in buffers}
    moved: dict[int, jax.Array] = {}
    next_ps: dict[int, jax.Array] = {}
    for place, run in enumerate(runs):
        program, own_gs = programs[run[0]], [gs[k] for k in run]
        if any(programs[k] != program for k in run):  # gradients of several dtypes
            program = replace(program, update_dtype=program.update_dtype and jnp.dtype("float32"))
            own_gs = [g.astype(jnp.float32) for g in own_gs]
        kept = [
            tuple(buffers[k, name][place] for name in stage.keeps) for k, stage in enumerate(stages)
        ]
        call = Call(program, len(run), jax.tree.structure([kept]), packed=True)
        own_ps = [ps[k] for k in run] if program.reads_params else []
        (new,), us, news = calls.run(
            call, wanted.backend, vectors, count, run, [kept], own_gs, own_ps
        )
        for (k, name), column in next_buffers.items():
            column.append(new[k][list(stages[k].keeps).index(name)])
        moved |= {k: u.astype(programs[k].update_dtype) for k, u in zip(run, us, strict=False)}
        next_ps |= dict(zip(run, news, strict=False))
    return next_buffers, moved, next_ps


def _kept(stages: Sequence[Stage], states: Sequence[Any]) -> dict[tuple[int, str], Any]:
    """What is kept of leaves, by the number of the stage and the field."""
    found: dict[tuple[int, str], Any] = {}
    _map_kept(stages, states, lambda key, field: found.setdefault(key, field))
    return found


def _map_kept(
    stages: Sequence[Stage], states: Sequence[Any], function: Callable[[Any, Any], Any]
) -> list[Any]:
    """The states, with a function applied to what they keep of leaves."""
    moved: list[Any] = []
    for k, (stage, state) in enumerate(zip(stages, states, strict=True)):
        own = state.stage if isinstance(state, CountedState) else state
        joined.check_state(stage, own, stage.state)
        own = own._replace(**{x: function((k, x), getattr(own, x)) for x in stage.keeps})
        moved.append(state._replace(stage=own) if isinstance(state, CountedState) else own)
    return moved


def _without(runs: Sequence[Sequence[int]], tree: PyTree) -> PyTree:
    """A tree with None at the packed leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    shared = {k for run in runs for k in run}
    return treedef.unflatten([None if k in shared else leaf for k, leaf in enumerate(leaves)])


def _filled(treedef: Any, alone: PyTree, shared: Mapping[int, jax.Array]) -> PyTree:
    """A tree with the packed leaves again."""
    parts = treedef.flatten_up_to(alone)
    return treedef.unflatten([shared.get(k, part) for k, part in enumerate(parts)])


def _ends(leaves: Sequence[Any], run: Sequence[int]) -> list[int]:
    return [*accumulate(math.prod(jnp.shape(leaves[k])) for k in run)]


def _check_packable(stage: Any) -> None:
    if not isinstance(stage, Stage):
        raise ValueError(
            f"packed: found {stage!r}, which is not a stage of ours. Put it around:"
            " chain(optax.clip_by_global_norm(1.0), packed(adamw()))."
        )
    if stage.moments != "float32":
        raise ValueError(
            f"packed: {stage.name} has moments={stage.moments!r}; expected 'float32'. Small leaves"
            " stay in float32 in every format, and what packs them is for float32 alone."
        )
    if not stage.elementwise:
        raise ValueError(
            f"packed: {stage.name} looks at whole leaves, which a buffer does not keep apart;"
            " expected stages that take each element by itself. Leave `packed` out."
        )


def _check_whole(params: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        devices = getattr(getattr(leaf, "sharding", None), "device_set", ())
        if not isinstance(leaf, Tracer) and len(devices) > 1:
            raise ValueError(
                f"packed: the parameter at {path_name(path) or 'the root'} is {describe(leaf)} on"
                f" {len(devices)} devices; expected parameters on one, as buffers of several leaves"
                " cannot be split as they are. Leave `packed` out."
            )


def _check_packed(
    stages: Sequence[Stage], states: Sequence[Any], params: PyTree, runs: Sequence[Sequence[int]]
) -> None:
    leaves = jax.tree.leaves(params)
    expected = [_ends(leaves, run)[-1] for run in runs]
    for (k, name), field in _kept(stages, states).items():
        if not isinstance(field, Packed):
            raise TypeError(
                f"packed: {name} of {stages[k].name} is not packed. `adamfn.repack` moves a plain"
                " state into this arrangement."
            )
        found = [buffer.size for buffer in field.buffers] if leaves else expected
        if found != expected:
            raise ValueError(
                f"packed: {name} of {stages[k].name} has buffers of {found} elements; expected"
                f" {expected}. The state is of other parameters: make it with this transformation's"
                " init(params)."
            )
