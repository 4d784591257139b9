# SPDX-License-Identifier: Apache-2.0
"""The same on a mesh: what an optimizer's step costs on each chip."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import adamfn
from adamfn.sharding import sharded, state_shardings, whole_blocks

from .candidates import RATE, Candidate
from .cost import Cost, cost, on
from .machines import Machine, UnavailableError


def adam_on_mesh(
    moments: Any, params: Any, shardings: Any, zero_axis: str | None
) -> adamfn.GradientTransformation:
    """Adam as it is to be used on a mesh: on the shards of leaves, in blocks that none cuts."""
    moments = whole_blocks(moments, params, shardings, zero_axis)
    return sharded(adamfn.adam(RATE, moments=moments), shardings, zero_axis)


def cost_on_mesh(
    candidate: Candidate, params: Any, shardings: Any, zero_axis: str | None, machine: Machine
) -> Cost:
    """What a step costs on each chip, where gradients lie as their parameters do.

    Args:
      candidate: an optimizer.
      params: shapes and dtypes.
      shardings: a `NamedSharding` for each of them, or one for all.
      zero_axis: the axis of the mesh that the state is split along further, or None.
      machine: whose chips the mesh is of.

    Raises:
      ValueError, TypeError: as `adamfn.sharding.state_shardings`.
    """
    tx = adamfn.GradientTransformation(candidate.init, candidate.step)  # which only inits here
    placed = state_shardings(tx, params, shardings, zero_axis)
    state = on(placed, jax.eval_shape(candidate.init, params))
    given = dict(jax.tree.leaves_with_path(shardings))

    def where_it_lies(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        heads = (path[:length] for length in range(len(path) + 1))
        return on(next(given[head] for head in heads if head in given), leaf)

    params = jax.tree.map_with_path(where_it_lies, params)
    return cost(candidate.step, params, state, params, machine)


def split_by(specs: dict[str, tuple[str | None, ...]], params: Any, mesh: Mesh) -> Any:
    """Shardings for parameters whose names have a spec, and everywhere for the others.

    Raises:
      UnavailableError: a spec names an axis that the mesh does not have.
    """
    for name, spec in specs.items():
        for axis in spec:
            if axis is not None and axis not in mesh.axis_names:
                raise UnavailableError(
                    f"The parameter {name!r} is to be split along the axis {axis!r}, which the mesh"
                    f" does not have; expected one of {', '.join(map(repr, mesh.axis_names))}."
                )
    return {name: NamedSharding(mesh, PartitionSpec(*specs.get(name, ()))) for name in params}
