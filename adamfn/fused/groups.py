"""Which leaves take a step together, and by which backend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats import Format
from adamfn.fused import cpu
from adamfn.fused.packing import Packed, packed_leaves, runs
from adamfn.fused.reference import Group, LeafStep
from adamfn.fused.scalars import Scalars
from adamfn.trees import PyTree, map_rows

LARGE = 2**18
"""Leaves from here on take their step alone: they outweigh the microseconds of a call."""


class Plan(NamedTuple):
    """What is static of a step: of each leaf in order, and of all of them."""

    formats: Sequence[Format | None]
    decays: Sequence[bool]
    nesterov: bool
    step_group: Callable[..., list[jax.Array]]
    """What takes the step of a group: `reference.step_group`, or another with its results."""
    leaves_of_a_call: int = 1
    """How many leaves that are not packed may take it together."""


def step_leaves(
    plan: Plan,
    grads: PyTree,
    params: PyTree,
    mu: Packed,
    nu: Packed,
    count: chex.Array,
    scalars: Scalars,
) -> tuple[Packed, Packed, PyTree]:
    """Takes the step of every leaf: of packed ones by runs, of the others by calls of several.

    Returns:
      The next mu and nu, and the next parameters.
    """
    gs, (ps, treedef) = jax.tree.leaves(grads), jax.tree.flatten(params)
    gs, ps = ([x if hasattr(x, "dtype") else jnp.asarray(x) for x in xs] for xs in (gs, ps))
    mus, nus = treedef.flatten_up_to(mu.leaves), treedef.flatten_up_to(nu.leaves)
    packed = runs(packed_leaves(mu, treedef))
    buffers = list(zip(mu.buffers, nu.buffers, strict=True))
    calls: dict[Callable[..., Any], list[tuple[list[int], tuple[PyTree, ...]]]] = {}

    def call(leaves: list[int], pairs: list[tuple[PyTree, PyTree]], *, flat: bool) -> None:
        decays = tuple(plan.decays[k] for k in leaves)
        stored = jax.tree.structure(pairs)
        group = Group(plan.formats[leaves[0]], plan.nesterov, decays, stored, flat)
        row = np.array(leaves, np.uint32), pairs, [gs[k] for k in leaves], [ps[k] for k in leaves]
        calls.setdefault(_GroupStep(group, plan.step_group), []).append((leaves, row))

    for run, pair in zip(packed, buffers, strict=True):
        call(run, [pair], flat=True)
    alone = [k for k, part in enumerate(mus) if part is not None]
    known = [k for k in alone if cpu.knows(plan.formats[k], gs[k].dtype, ps[k].dtype)]
    for leaves in _together(known, plan, ps):
        call(leaves, [(mus[k], nus[k]) for k in leaves], flat=False)
    for k in sorted({*alone} - {*known}):
        step = LeafStep(plan.formats[k], plan.nesterov, plan.decays[k])
        row = np.uint32(k), gs[k], ps[k], mus[k], nus[k]
        calls.setdefault(step, []).append(([k], row))

    vector = scalars.as_vector()
    for function, rows in calls.items():
        of_group = isinstance(function, _GroupStep)
        results = map_rows(
            function, [row for _, row in rows], (count, vector if of_group else scalars)
        )
        for (leaves, _), result in zip(rows, results, strict=True):
            pairs, moved = result if of_group else ([result[:2]], result[2:])
            if leaves in packed:
                buffers[packed.index(leaves)] = pairs[0]
            else:
                for k, (next_mu, next_nu) in zip(leaves, pairs, strict=True):
                    mus[k], nus[k] = next_mu, next_nu
            for k, p in zip(leaves, moved, strict=True):
                ps[k] = p
    return (
        Packed(treedef.unflatten(mus), tuple(buffer for buffer, _ in buffers)),
        Packed(treedef.unflatten(nus), tuple(buffer for _, buffer in buffers)),
        treedef.unflatten(ps),
    )


def _together(known: Sequence[int], plan: Plan, params: Sequence[jax.Array]) -> list[list[int]]:
    """Leaves that take a step in one call: large ones alone, others with those of their format."""
    rest: dict[Format | None, list[int]] = {}
    for k in known:
        if params[k].size < LARGE:
            rest.setdefault(plan.formats[k], []).append(k)
    size = plan.leaves_of_a_call
    batches = [own[i : i + size] for own in rest.values() for i in range(0, len(own), size)]
    return [[k] for k in known if params[k].size >= LARGE] + batches


@dataclass(frozen=True)
class _GroupStep:
    group: Group
    step_group: Callable[..., list[jax.Array]]

    def __call__(
        self,
        numbers: jax.Array,
        pairs: list[tuple[PyTree, PyTree]],
        grads: list[jax.Array],
        params: list[jax.Array],
        count: jax.Array,
        vector: jax.Array,
    ) -> tuple[list[tuple[PyTree, PyTree]], list[jax.Array]]:
        operands = [vector, count, numbers, *jax.tree.leaves(pairs), *grads, *params]
        results = self.step_group(self.group, *operands)
        kept = jax.tree.unflatten(self.group.stored, results[: self.group.moments])
        return kept, results[self.group.moments :]
