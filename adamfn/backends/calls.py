"""Calls of programs: which leaves share a call, and how a call is made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamfn.backends.primitive import Backend, bind
from adamfn.backends.shards import run_on_shards
from adamfn.backends.xla import run_call, run_whole
from adamfn.core.leaf import Kept, Leaf, with_empty, without_empty
from adamfn.core.placement import Shards, split_like
from adamfn.core.program import Call, Program
from adamfn.core.stage import Stage
from adamfn.core.varying import axes_of

LARGE = 2**18
"""Leaves from here on are called alone: they outweigh the microseconds of a call."""

_LEAVES = 16
"""Smaller leaves that share a call."""

Results = tuple[list[Kept], list[jax.Array]]
"""The next state of a leaf for each part of its program, then its update and its parameter."""


@dataclass
class Step:
    """One step of a run of stages: everything that its leaves have in common."""

    stages: Sequence[Stage]
    scalars: Sequence[Any]
    """Those of each stage."""
    gate: jax.Array | None
    """Whether the step is taken; None if no stage says so."""
    count: jax.Array
    backend: Backend
    _vectors: dict[Any, jax.Array] = field(default_factory=dict[Any, jax.Array])

    def vector(self, places: tuple[int, ...], dtype: Any) -> jax.Array:
        """The scalars of some stages, then the gate, in a real dtype; never empty."""
        if (places, dtype) not in self._vectors:
            found = jax.tree.leaves([self.scalars[place] for place in places])
            found += [] if self.gate is None else [self.gate]
            arrays = [jnp.asarray(scalar, dtype) for scalar in found]
            self._vectors[places, dtype] = jnp.stack(arrays) if arrays else jnp.zeros((1,), dtype)
        return self._vectors[places, dtype]

    def state_of(self, leaf: Leaf, places: Sequence[int]) -> list[Kept]:
        """The state of a leaf for some stages, as programs take it."""
        return [
            without_empty(self.stages[k], leaf.formats[k], leaf.grad, leaf.kept[k]) for k in places
        ]


def run_segment(
    step: Step, programs: Sequence[Program], leaves: Sequence[Leaf], segment: range
) -> None:
    """Runs the program of every leaf in one segment, and puts its results into the leaf."""
    for program, places, own in _together(step, programs, leaves, segment):
        run = _run_fused if program.fused else _run_whole
        last = segment.stop == len(step.stages)
        for leaf, (rows, moved) in zip(own, run(step, program, places, own, last), strict=True):
            for place, row in zip(places, rows, strict=True):
                leaf.kept[place] = with_empty(row, leaf.kept[place])
            if program.update_dtype is not None:
                leaf.update = moved[0]
            if program.moves:
                leaf.param = moved[-1]


def _together(
    step: Step, programs: Sequence[Program], leaves: Sequence[Leaf], segment: range
) -> Iterator[tuple[Program, tuple[int, ...], list[Leaf]]]:
    """The leaves of each call, alike in all but shape, and large ones alone."""
    most = 1 if step.backend == "pallas" else _LEAVES
    alike: dict[Any, list[Leaf]] = {}
    for program, leaf in zip(programs, leaves, strict=True):
        places = tuple(place for place in segment if leaf.active[place])
        if not places and not program.moves and program.update_dtype in (None, leaf.update.dtype):
            continue
        g, p = leaf.update, leaf.param if program.reads_params else None
        dtypes = g.dtype, getattr(p, "dtype", None)
        # Outside jit, the arrays of one call must be on the same devices.
        device = None if isinstance(g, Tracer) else getattr(g, "sharding", None)
        # Inside shard_map, all results of a call vary over each axis that an operand varies over.
        alone = leaf.index if g.size >= LARGE or not program.fused else None
        arrays = [] if alone is not None else jax.tree.leaves((g, p, leaf.kept))
        varies = frozenset(map(axes_of, arrays))
        key = program, places, dtypes, device, varies, leaf.shards, alone
        alike.setdefault(key, []).append(leaf)
    for (program, places, *_), own in alike.items():
        # Leaves of one shape beside one another: calls of one signature are traced once.
        own.sort(key=lambda leaf: leaf.grad.shape)
        for start in range(0, len(own), most):
            yield program, places, own[start : start + most]


def _run_fused(
    step: Step, program: Program, places: tuple[int, ...], leaves: Sequence[Leaf], last: bool
) -> list[Results]:
    """The results of an elementwise program on some leaves, by any backend."""
    rows = [step.state_of(leaf, places) for leaf in leaves]
    call = Call(program, len(leaves), jax.tree.structure(rows))
    grads = [leaf.update for leaf in leaves]
    params = [leaf.param for leaf in leaves] if program.reads_params else []
    indices = np.array([[leaf.index, 0] for leaf in leaves], np.uint32)
    vector = step.vector(places, program.dtype)
    operands = [vector, step.count, indices, *jax.tree.leaves(rows), *grads, *params]
    if not program.known:
        jax.eval_shape(partial(run_call, call), *operands)  # mistakes show now, not when it lowers
    shards = leaves[0].shards
    if shards is not None and not last:
        shards = replace(shards, home=shards.axes)  # updates stay split until the last segment
    results = _bound(call, step.backend, shards, operands)
    kept, moved = results[: call.arrays_kept], results[call.arrays_kept :]
    columns = [moved[k :: len(leaves)] for k in range(len(leaves))]
    return list(zip(jax.tree.unflatten(call.kept, kept), columns, strict=True))


def _run_whole(
    step: Step, program: Program, places: tuple[int, ...], leaves: Sequence[Leaf], last: bool
) -> list[Results]:
    """The results of any program on a whole leaf, by XLA."""
    (leaf,) = leaves
    given: list[Any] = step.state_of(leaf, [place for place, _ in program.given])
    rows = step.state_of(leaf, places)
    arrays = leaf.update, leaf.param if program.reads_params else None, leaf.seen
    # Gradient, parameter and moments may be split unlike each other: all as the moments at first.
    kept = [x for x in jax.tree.leaves((rows, given, arrays)) if x.shape == leaf.grad.shape]
    u, p, seen = (x if x is None else split_like(x, kept[0]) for x in arrays)
    given += [seen] if program.given_grads else []
    vector, index = step.vector(places, program.dtype), np.uint32(leaf.index)
    new, moved = run_whole(program, vector, step.count, index, (u, p, rows), given)
    homes = [] if program.update_dtype is None else [leaf.grad if last else u]
    homes += [leaf.param] if program.moves else []
    return [(jax.tree.map(split_like, new, rows), list(map(split_like, moved, homes)))]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _bound(
    call: Call, backend: Backend, shards: Shards | None, operands: list[jax.Array]
) -> list[jax.Array]:
    if shards is None:
        return bind(call, backend, operands)
    return run_on_shards(call, backend, shards, operands)
