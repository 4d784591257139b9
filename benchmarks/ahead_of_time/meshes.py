"""The same on a mesh: what an optimizer's step costs on each chip."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adamfn.sharding import state_shardings

from .candidates import Candidate
from .cost import Cost, cost, on
from .machines import Machine, Unavailable


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
    placed = state_shardings(candidate, params, shardings, zero_axis)
    state = on(placed, jax.eval_shape(candidate.init, params))
    whole = jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda _: sharding, part),
        shardings,
        params,
        is_leaf=lambda node: isinstance(node, NamedSharding),
    )
    params = on(whole, params)
    return cost(candidate.step, params, state, params, machine)


def split_by(specs: dict[str, tuple[str | None, ...]], params: Any, mesh: Mesh) -> Any:
    """Shardings for parameters whose names have a spec, and everywhere for the others.

    Raises:
      Unavailable: a spec names an axis that the mesh does not have.
    """
    for name, spec in specs.items():
        for axis in spec:
            if axis is not None and axis not in mesh.axis_names:
                raise Unavailable(
                    f"The parameter {name!r} is to be split along the axis {axis!r}, which the mesh"
                    f" does not have; expected one of {', '.join(map(repr, mesh.axis_names))}."
                )
    return {name: NamedSharding(mesh, PartitionSpec(*specs.get(name, ()))) for name in params}
