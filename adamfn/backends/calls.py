# SPDX-License-Identifier: Apache-2.0
"""Calls of programs: which leaves share a call, and how a call is made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from adamfn.backends.call import Call, Operands, Results
from adamfn.backends.primitive import Backend, bind_primitive
from adamfn.backends.shards import run_on_shards
from adamfn.backends.xla import run_call, run_whole
from adamfn.core.leaf import Leaf
from adamfn.core.placement import Shards, axes_of, split_like, split_together
from adamfn.core.program import Program
from adamfn.core.stage import Stage
from adamfn.formats.noise import mixed
from adamfn.trees import at_least

LARGE = 2**18
"""Leaves from here on are called alone: they outweigh the microseconds of a call."""

_LEAVES = 32
"""Smaller leaves that share a call."""


@dataclass
class Step:
    """One step of a run of stages: everything that its leaves have in common."""

    stages: Sequence[Stage]
    states: Sequence[Any]
    count: jax.Array
    backend: Backend
    scalars: list[tuple[Any, ...]] = field(default_factory=list[Any])
    """Those of each stage."""
    remembered: list[dict[str, Any]] = field(default_factory=list[Any])
    """The values that each state remembers of it."""
    gate: jax.Array | None = None
    """Whether it is taken; None if no stage says so."""
    _vectors: dict[Any, jax.Array] = field(default_factory=dict[Any, jax.Array])

    def vector(self, places: tuple[int, ...], dtype: Any) -> jax.Array:
        """The scalars of some stages, then the gate, in a real dtype; never empty."""
        if (places, dtype) not in self._vectors:
            found = jax.tree.leaves([self.scalars[place] for place in places])
            found += [] if self.gate is None else [self.gate]
            arrays = [jnp.atleast_1d(jnp.asarray(scalar, dtype)) for scalar in found]
            # Not stacked: under vmap, JAX stacks no scalars that explicit axes split differently.
            vector = jnp.concatenate(arrays or [jnp.zeros((1,), dtype)])
            if self.gate is not None:  # those of a skipped step may be NaN
                skipped = np.array([1] * (len(arrays) - 1) + [0], dtype)
                vector = jnp.where(self.gate, vector, skipped)
            self._vectors[places, dtype] = vector
        return self._vectors[places, dtype]

    def wait_for(self, x: Any) -> None:
        """Lets the calls to come depend on a result, on CPU, under `jit` and without a mesh.

        XLA for CPU would begin with the first segments of all leaves, and keep all their updates.
        """
        meshes = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
        if isinstance(x, Tracer) and all(mesh.empty for mesh in meshes):
            self.count = jax.lax.platform_dependent(
                self.count, x, cpu=_after, default=lambda count, _: count
            )

    def indices(self, leaves: Sequence[Leaf]) -> Any:
        """The `indices` of a call, with the stages' seeds mixed into the leaves'."""
        indices = np.array([[leaf.index, 0] for leaf in leaves], np.uint32)
        seeds = [stage.seed for stage in self.stages if stage.seed is not None]
        return indices + mixed(seeds) * np.array([1, 0], np.uint32) if seeds else indices


def _after(count: jax.Array, x: jax.Array) -> jax.Array:
    # This adds 0, which XLA does not know. It removes barriers before it orders operations.
    return count + ((count < 0) & (x[(0,) * x.ndim] != 0)).astype(jnp.int32)


def in_turn(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    """All small leaves, then each large one: between segments, their updates are in memory."""
    groups: list[list[Leaf]] = [[]]
    for leaf in leaves:
        if at_least(leaf.grad.size, LARGE):
            groups.append([leaf])
        else:
            groups[0].append(leaf)
    return groups


def together(step: Step, leaves: Sequence[Leaf], segment: range) -> Iterator[list[Leaf]]:
    """The leaves of each call, alike in all but shape.

    Large leaves, and leaves of a program with a statistic, are alone. Leaves that the segment does
    not change are left out.
    """
    most = 1 if step.backend == "pallas" else _LEAVES
    is_manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    alike: dict[Any, list[Leaf]] = {}
    for leaf in leaves:
        program, u = leaf.program, leaf.update
        places = tuple(place for place in segment if leaf.active[place])
        if not places and not program.moves and program.update_dtype in (None, u.dtype):
            continue
        p = leaf.param if program.reads_params else None
        dtypes = u.dtype, getattr(p, "dtype", None)
        # Outside jit, the arrays of one call must be on the same devices.
        device = None if isinstance(u, Tracer) else getattr(u, "sharding", None)
        # Inside shard_map, all results of a call vary over each axis that an operand varies over.
        alone = leaf.index if at_least(u.size, LARGE) or not program.fused else None
        arrays = jax.tree.leaves((u, p, leaf.kept)) if is_manual and alone is None else []
        varies = frozenset(map(axes_of, arrays))
        # Equal programs are one object here, and a hash of them takes long.
        key = id(program), places, dtypes, device, varies, leaf.shards, alone
        alike.setdefault(key, []).append(leaf)
    for own in alike.values():
        # Leaves of one shape beside one another: calls of one signature are traced once.
        own.sort(key=lambda leaf: str(leaf.grad.shape))
        yield from (own[start : start + most] for start in range(0, len(own), most))


def run_leaves(step: Step, leaves: Sequence[Leaf], segment: range) -> None:
    """Runs the program that some leaves share, and puts the results into them.

    Updates of the last segment are split over a mesh as gradients are; those before, as moments.
    """
    program: Program = leaves[0].program
    last = segment.stop == len(step.stages)
    places = tuple(place for place in segment if leaves[0].active[place])
    rows = [[leaf.kept[place] for place in places] for leaf in leaves]
    scalars, indices = step.vector(places, program.dtype), step.indices(leaves)
    if program.fused:
        call, updates = Call(program), [leaf.update for leaf in leaves]
        params = [leaf.param for leaf in leaves] if program.reads_params else []
        operands = Operands(scalars, step.count, indices, rows, updates, params)
        if not program.known:
            jax.eval_shape(partial(run_call, call), operands)  # mistakes show before it lowers
        shards = leaves[0].shards
        shards = shards if shards is None or last else replace(shards, home=shards.axes)
        results = bind(call, step.backend, shards, operands)
    else:
        (leaf,), (row,) = leaves, rows
        given: list[Any] = [leaf.kept[place] for place, _ in program.given]
        given += [leaf.seen] if program.given_grads else []
        arrays = leaf.update, leaf.param if program.reads_params else None, row
        arrays, given = split_together((arrays, given), leaf.update, row)
        results = run_whole(program, scalars, step.count, indices[0, 0], arrays, given)
        home = [leaf.grad if last else leaf.update][: len(results.updates)]
        homes = Results([row], home, [leaf.param][: len(results.params)])
        results = jax.tree.map(split_like, results, homes)
    for leaf, row in zip(leaves, results.kept, strict=True):
        for place, new in zip(places, row, strict=True):
            leaf.kept[place] = new
    for leaf, u in zip(leaves, results.updates, strict=False):
        leaf.update = u
    for leaf, p in zip(leaves, results.params, strict=False):
        leaf.param = p


@partial(jax.jit, static_argnums=(0, 1, 2))
def bind(call: Call, backend: Backend, shards: Shards | None, operands: Operands) -> Results:
    """The results of a call, on the shards of its leaves if they are split."""
    if shards is not None:
        return run_on_shards(call, backend, shards, operands)
    return bind_primitive(call, backend, operands)
