"""Where parameters are on a mesh, and where the arrays of a state belong beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamfn.core.varying import vary_together
from adamfn.trees import PyTree, describe

Path: TypeAlias = tuple[Any, ...]
Axes: TypeAlias = tuple[tuple[str, ...], ...]
"""For each dimension of an array, the mesh axes that split it."""


class Placed(NamedTuple):
    """A parameter, and where it is."""

    shape: tuple[int, ...]
    axes: Axes
    memory_kind: str | None


@dataclass(frozen=True)
class Shards:
    """How a leaf is split over a mesh for its step."""

    mesh: Mesh | AbstractMesh
    axes: Axes
    """The mesh axes that split each dimension of its moments."""
    home: Axes
    """Likewise of the updates. So are parameters, unless explicit axes split them otherwise."""


def size(names: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices these axes split a dimension."""
    return math.prod(mesh.shape[name] for name in names)


def place(
    caller: str, params: PyTree, shardings: PyTree, *, all_used: bool = True
) -> tuple[dict[Path, Placed], Mesh | AbstractMesh]:
    """Where each parameter is, by its path, and the mesh that all are on.

    Args:
      caller: what error messages begin with.
      params: the parameters.
      shardings: a `NamedSharding` for each of them, or for each subtree.
      all_used: whether to refuse a sharding of no parameter.

    Raises:
      ValueError, TypeError: as `state_shardings`.
    """
    given: dict[Path, Any] = dict(jax.tree.leaves_with_path(shardings))
    if not given:
        raise ValueError(
            f"{caller}: shardings has no leaves; expected a NamedSharding for each parameter,"
            " or one for all of them, such as NamedSharding(mesh, PartitionSpec())."
        )
    first = next(iter(given))
    for path, sharding in given.items():
        if not isinstance(sharding, NamedSharding):
            is_spec = isinstance(sharding, PartitionSpec)
            found = f"the spec {sharding}" if is_spec else describe(sharding)
            raise TypeError(
                f"{caller}: shardings at {_name(path)} is {found}; expected a"
                " jax.sharding.NamedSharding, which knows its mesh."
            )
        if sharding.mesh != given[first].mesh:
            raise ValueError(
                f"{caller}: the sharding at {_name(path)} is on {sharding.mesh}, and that at"
                f" {_name(first)} on {given[first].mesh}; expected one mesh for all of them."
            )
    placed: dict[Path, Placed] = {}
    unused, mesh = {*given} - {()} if all_used else set[Path](), given[first].mesh
    leaves: list[tuple[Path, Any]] = jax.tree.leaves_with_path(params, is_leaf=lambda x: x is None)
    for path, leaf in leaves:
        head = next((path[:k] for k in range(len(path) + 1) if path[:k] in given), None)
        unused -= {head}
        if leaf is None:
            continue
        if head is None:
            raise ValueError(
                f"{caller}: found no sharding for the parameter at {_name(path)},"
                f" {describe(leaf)}; expected a NamedSharding there or above it. Make them from"
                " params: jax.tree.map(lambda p: NamedSharding(mesh, ...), params)."
            )
        spec = given[head].spec
        axes = axes_of_spec(spec, leaf.ndim)
        if len(axes) > leaf.ndim or any(map(lambda n, x: n % size(x, mesh), leaf.shape, axes)):
            sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
            raise ValueError(
                f"{caller}: the parameter at {_name(path)} is {describe(leaf)}, and its"
                f" sharding is {spec} on a mesh of {sizes}; expected at most one entry a"
                " dimension, and axes whose sizes divide it."
            )
        placed[path] = Placed(leaf.shape, axes, given[head].memory_kind)
    for path in unused:
        raise ValueError(
            f"{caller}: found a sharding at {_name(path)}, where params has no leaf;"
            " expected shardings with the structure of params, or of its upper part."
        )
    return placed, mesh


def axes_beside(
    shape: tuple[int, ...], whole: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh
) -> Axes:
    """The axes that split an array of the state, given the axes that split its parameter.

    A dimension shorter than the parameter's has an entry for each block of elements, and is split
    if no shard has a part of a block.
    """

    def divides(n: int, m: int, names: tuple[str, ...]) -> bool:
        return n == m or (n > 0 and m % n == 0 and n % size(names, mesh) == 0)

    dimensions = zip(shape, whole, axes, strict=True)
    return tuple(names if divides(n, m, names) else () for n, m, names in dimensions)


def spec_of(axes: Axes) -> PartitionSpec:
    """The `PartitionSpec` with these axes."""
    while axes and not axes[-1]:
        axes = axes[:-1]
    return PartitionSpec(*(names[0] if len(names) == 1 else names or None for names in axes))


def axes_of_spec(spec: PartitionSpec, dimensions: int) -> Axes:
    """The inverse of `spec_of`, for an array with so many dimensions."""
    names = tuple(spec) + (None,) * (dimensions - len(spec))
    return tuple((n,) if isinstance(n, str) else tuple(n or ()) for n in names)


def split_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array, split as another one whose type names explicit axes of a mesh."""
    theirs = jax.typeof(like).sharding
    is_explicit = AxisType.Explicit in theirs.mesh.axis_types
    return jax.sharding.reshard(x, theirs) if is_explicit else x


def split_together(arrays: PyTree, update: jax.Array, kept: PyTree) -> PyTree:
    """Arrays of one leaf, those of its shape split like what is kept of it, or else its update."""
    like = next(x for x in jax.tree.leaves((kept, update)) if x.shape == update.shape)
    return jax.tree.map(lambda x: split_like(x, like) if x.shape == like.shape else x, arrays)


def zeros_beside(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of another shape and dtype beside a parameter, split as it is if this cuts no block."""
    if like.shape == jnp.shape(leaf):
        return jnp.zeros_like(leaf, like.dtype)
    traced, device = isinstance(leaf, Tracer), None
    if traced or getattr(leaf, "committed", False):
        # The type of a traced array says which explicit axes of a mesh split it.
        device = jax.typeof(leaf).sharding if traced else leaf.sharding
    if isinstance(device, NamedSharding):
        axes: Axes = ()
        if len(like.shape) == leaf.ndim:
            whole = axes_of_spec(device.spec, leaf.ndim)
            axes = axes_beside(like.shape, leaf.shape, whole, device.mesh)
        split = NamedSharding(device.mesh, spec_of(axes), memory_kind=device.memory_kind)
        device = split if any(axes) or not traced else None
    elif device is not None and len(device.device_set) > 1:
        device = None  # a sharding of this one shape
    zeros = jnp.zeros(like.shape, like.dtype, device=device)
    return vary_together([zeros, leaf])[0] if traced else zeros


def _name(path: Path) -> str:
    return jax.tree_util.keystr(path) or "the root"
