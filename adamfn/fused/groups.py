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


class Plan(NamedTuple):
    """What is static of a step: of each leaf in order, and of all of them."""

    formats: Sequence[Format | None]
    decays: Sequence[bool]
    nesterov: bool
    step_group: Callable[..., list[jax.Array]]
    """What takes the step of a group: `reference.step_group`, or another with its results."""


def step_leaves(
    plan: Plan,
    grads: PyTree,
    params: PyTree,
    mu: Packed,
    nu: Packed,
    count: chex.Array,
    scalars: Scalars,
) -> tuple[Packed, Packed, PyTree]:
    """Takes the step of every leaf: of packed ones by runs, of the others one by one.

    Returns:
      The next mu and nu, and the next parameters.
    """
    gs, (ps, treedef) = jax.tree.leaves(grads), jax.tree.flatten(params)
    mus, nus = treedef.flatten_up_to(mu.leaves), treedef.flatten_up_to(nu.leaves)
    packed = runs(packed_leaves(mu, treedef))
    calls: dict[Callable[..., Any], list[tuple[int, tuple[PyTree, ...]]]] = {}

    def group_of(leaves: Sequence[int], moments: tuple[PyTree, PyTree], *, flat: bool) -> None:
        of_group = Group(
            plan.formats[leaves[0]],
            plan.nesterov,
            tuple(plan.decays[k] for k in leaves),
            jax.tree.structure(moments),
            flat,
        )
        row = (
            np.array(leaves, np.uint32),
            *moments,
            [gs[k] for k in leaves],
            [ps[k] for k in leaves],
        )
        place = -1 - packed.index(list(leaves)) if flat else leaves[0]
        calls.setdefault(_GroupStep(of_group, plan.step_group), []).append((place, row))

    for run, mu_buffer, nu_buffer in zip(packed, mu.buffers, nu.buffers, strict=True):
        group_of(run, (mu_buffer, nu_buffer), flat=True)
    for k, (g, p, format) in enumerate(zip(gs, ps, plan.formats, strict=True)):
        if mus[k] is None:
            continue
        if cpu.knows(format, g.dtype, p.dtype):
            group_of([k], (mus[k], nus[k]), flat=False)
        else:
            step = LeafStep(format, plan.nesterov, plan.decays[k])
            calls.setdefault(step, []).append((k, (np.uint32(k), g, p, mus[k], nus[k])))

    buffers: list[tuple[jax.Array, jax.Array]] = [(jnp.zeros(0), jnp.zeros(0))] * len(packed)
    vector = scalars.as_vector()
    for function, rows in calls.items():
        shared = (count, vector if isinstance(function, _GroupStep) else scalars)
        results = map_rows(function, [row for _, row in rows], shared)
        for (place, _), (next_mu, next_nu, moved) in zip(rows, results, strict=True):
            if place < 0:
                buffers[-1 - place] = next_mu, next_nu
                for k, p in zip(packed[-1 - place], moved, strict=True):
                    ps[k] = p
            else:
                mus[place], nus[place] = next_mu, next_nu
                (ps[place],) = moved if isinstance(function, _GroupStep) else (moved,)
    return (
        Packed(treedef.unflatten(mus), tuple(next_mu for next_mu, _ in buffers)),
        Packed(treedef.unflatten(nus), tuple(next_nu for _, next_nu in buffers)),
        treedef.unflatten(ps),
    )


@dataclass(frozen=True)
class _GroupStep:
    group: Group
    step_group: Callable[..., list[jax.Array]]

    def __call__(
        self,
        numbers: jax.Array,
        mu: PyTree,
        nu: PyTree,
        grads: list[jax.Array],
        params: list[jax.Array],
        count: jax.Array,
        vector: jax.Array,
    ) -> tuple[PyTree, PyTree, list[jax.Array]]:
        operands = [vector, count, numbers, *jax.tree.leaves((mu, nu)), *grads, *params]
        results = self.step_group(self.group, *operands)
        kept = jax.tree.unflatten(self.group.stored, results[: self.group.moments])
        return *kept, results[self.group.moments :]
