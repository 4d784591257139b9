# SPDX-License-Identifier: Apache-2.0
"""Runs of stages over a tree: their states, their scalars, and one fused program for each leaf.

A run is all neighbouring adamfn stages of a chain. It is cut into segments: a stage that is not
elementwise is a segment by itself, and the stages between two of these form one. The states, the
count, the scalars and the gate are those of the run.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import pairwise, starmap
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.backends.calls import Step, in_turn, run_leaves, together
from adamfn.chains.leaves import Request, leaves_of, next_count, next_states
from adamfn.core.leaf import Leaf
from adamfn.core.program import Part, Program
from adamfn.core.stage import Stage
from adamfn.core.weights import Weights
from adamfn.trees import PyTree, described, shown


def run(
    stages: Sequence[Stage], updates: PyTree, states: Sequence[PyTree], request: Request
) -> tuple[PyTree, PyTree, list[PyTree]]:
    """One step: the updates and the moved parameters, if asked for, and the next states."""
    count, treedef = next_count(stages, states), jax.tree.structure(updates)
    leaves = leaves_of(stages, updates, states, request)
    step = step_at(stages, states, count, [leaf.grad for leaf in leaves], request)
    segments, made = segments_of(stages), dict[Any, Program]()
    for k, group in enumerate(in_turn(leaves) if len(segments) > 1 else [leaves]):
        for segment in segments:
            for leaf in group:
                if "mu" in stages[segment.start].keeps:
                    leaf.seen = leaf.update
                dtypes = leaf.dtype, leaf.grad.dtype, getattr(leaf.param, "dtype", None)
                key = segment, dtypes, *leaf.active, *leaf.formats
                if key not in made:
                    made[key] = program_of(step, segment, leaf, request)
                leaf.program = made[key]
            for alike in together(step, group, segment):
                run_leaves(step, alike, segment)
        if k > 0:
            step.wait_for(group[0].param if request.moves else group[0].update)
    return (
        treedef.unflatten([leaf.update for leaf in leaves]) if request.updates else None,
        treedef.unflatten([leaf.param for leaf in leaves]) if request.moves else None,
        next_states(step, leaves, treedef),
    )


def step_at(
    stages: Sequence[Stage],
    states: Sequence[Any],
    count: jax.Array,
    grads: Sequence[Any],
    request: Request,
) -> Step:
    """The scalars of the stages at a step, what their states remember of it, and its gate."""
    step, gates = Step(stages, states, count, request.backend), list[jax.Array]()
    extra = {**request.extra, "grads": grads, "decays": request.decays}
    for stage, state in zip(stages, states, strict=True):
        match stage.scalars(count, state, extra):
            case (tuple() | list() as own, Mapping() as new):
                step.scalars.append(tuple(own))
                step.remembered.append({k: v for k, v in new.items() if k in state._fields})
            case result:
                raise TypeError(
                    f"{stage.name}: its scalars returned {shown(result)}; expected the formula's"
                    " scalars in a tuple, then the values to remember in a dictionary: (x, y), {}."
                )
        for scalar in jax.tree.leaves(step.scalars[-1]):
            if jnp.shape(scalar) != ():
                raise ValueError(
                    f"{stage.name}: found {described(scalar)} among its scalars; expected numbers"
                    " and arrays without axes."
                )
        extra["decays"] = stage.decays or extra["decays"]
        if "taken" in step.remembered[-1]:
            gates.append(step.remembered[-1]["taken"])
            if all("grads" in other.takes for other in stages):
                raise ValueError(
                    f"{stage.name}: nothing stands after it in its run, whose steps alone it can"
                    " skip; expected the stages that it is to hold in the same adamfn.chain."
                    " optax.chain, and parts of other libraries, end a run."
                )
    step.gate = reduce(jnp.logical_and, gates) if gates else None
    return step


def segments_of(stages: Sequence[Stage]) -> list[range]:
    """The places of the stages of each segment of a run.

    A segment begins at the moments if a stage of a later segment reads the gradient that they were
    given: that gradient is then in memory. Where weights are averaged, the last segment begins at
    the rounding before it, or else at the average: only XLA runs it.
    """
    whole = [place for place, stage in enumerate(stages) if not stage.elementwise]
    cuts = {0, len(stages), *whole, *(place + 1 for place in whole)}
    for place, stage in enumerate(stages):
        if "new_params" in stage.reads and len(stages) > 1:
            cuts.add(place - isinstance(stages[place - 1].formula, Weights))
    for place, stage in enumerate(stages):
        moments = [k for k in range(place) if "mu" in stages[k].keeps]
        if "grads" in stage.reads and moments and any(moments[-1] < k <= place for k in whole):
            cuts.add(moments[-1])
    ends = sorted(cuts)
    return list(starmap(range, pairwise(ends)))


def program_of(step: Step, segment: range, leaf: Leaf, request: Request) -> Program:
    """The program of a leaf in a segment; ValueError if it reads moments that nothing keeps."""
    parts = {
        k: Part(stage.name, stage.formula, tuple(stage.reads), tuple(stage.keeps), leaf.formats[k])
        for k, stage in enumerate(step.stages[: segment.stop])
        if leaf.active[k]
    }
    own = {k: part for k, part in parts.items() if k in segment}
    # Moments, and the gradient that they were given, may come from an earlier segment.
    known, given, given_grads = {"params", "new_params", "noise"}, dict[int, Part](), False
    for place, part in own.items():
        for name in sorted({*part.reads} - known):
            # The gradient is worth reading beside an update only after a stage that averages it.
            fields = [(k, parts[k].keeps) for k in parts if k < place]
            keepers = [k for k, kept in fields if name in kept or (kept and name == "grads")]
            if not keepers:
                raise ValueError(
                    f"{part.name}: it reads {name}, and no stage before it in its run keeps"
                    " averages of gradients; expected one, such as scale_by_moments, before it in"
                    " the same adamfn.chain. optax.chain, and parts of other libraries, end a run."
                )
            if name != "grads":
                given[keepers[-1]] = parts[keepers[-1]]
        given_grads |= "grads" in part.reads and "mu" not in known and segment.start > 0
        known |= {*part.keeps}
    last = segment.stop == len(step.stages)
    rounds = last and any(isinstance(part.formula, Weights) for part in own.values())
    dtype = jnp.dtype(jnp.float32) if rounds else leaf.dtype  # the weights' words have 32 bits
    update_dtype = None
    if not last:
        # Nothing is rounded between two segments.
        with jax.numpy_dtype_promotion("standard"):  # complex64 of complex64 and float32
            update_dtype = jnp.promote_types(leaf.grad.dtype, leaf.dtype)
    elif request.updates:
        update_dtype = dtype if rounds else update_dtype_of(leaf.grad, leaf.param)
    return Program(
        tuple(own.values()),
        jax.tree.structure(tuple(step.scalars[k] for k in own)),
        dtype,
        last and request.moves,
        update_dtype,
        step.gate is not None,
        all(step.stages[k].elementwise for k in own),
        tuple(given.items()),
        given_grads,
        last,
    )


def update_dtype_of(grad: Any, param: Any) -> Any:
    """The gradient's dtype, but float32 where float16 would lose small updates of wider params."""
    if grad.dtype == jnp.float16 and getattr(param, "dtype", None) != jnp.float16:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(grad.dtype)
