"""Where the parameters are, in a form to reason about, and what is wrong if they cannot be."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

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
    home: Axes | None = None
    """Likewise of the parameter, where results belong; None for the place of their operands."""


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
      all_used: whether one that is for no parameter is a mistake.

    Raises:
      ValueError, TypeError: as `state_shardings`.
    """
    given = cast("dict[Path, Any]", dict(jax.tree.leaves_with_path(shardings)))
    for path, sharding in given.items():
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"{caller}: shardings at {_name(path)} is {_describe(sharding)}; expected a"
                " jax.sharding.NamedSharding, which knows its mesh."
            )
    first = next(iter(given.items()), None)
    if first is None:
        raise ValueError(
            f"{caller}: shardings has no leaves; expected a NamedSharding for each parameter,"
            " or one for all of them, such as NamedSharding(mesh, PartitionSpec())."
        )
    for path, sharding in given.items():
        if sharding.mesh != first[1].mesh:
            raise ValueError(
                f"{caller}: the sharding at {_name(path)} is on {sharding.mesh}, and that at"
                f" {_name(first[0])} on {first[1].mesh}; expected one mesh for all of them."
            )
    placed: dict[Path, Placed] = {}
    used: set[Path] = set()
    leaves = cast("list[tuple[Path, Any]]", jax.tree.leaves_with_path(params, is_leaf=_is_none))
    for path, leaf in leaves:
        heads = (path[:length] for length in range(len(path) + 1))
        head = next((head for head in heads if head in given), None)
        if head is not None:
            used.add(head)
        if leaf is None:
            continue
        if head is None:
            raise ValueError(
                f"{caller}: found no sharding for the parameter at {_name(path)},"
                f" {describe(leaf)}; expected a NamedSharding there or above it. Make them from"
                " params: jax.tree.map(lambda p: NamedSharding(mesh, ...), params)."
            )
        sharding = given[head]
        placed[path] = Placed(
            leaf.shape, _axes_on(caller, path, leaf, sharding), sharding.memory_kind
        )
    for path in given:
        if all_used and path and path not in used:
            raise ValueError(
                f"{caller}: found a sharding at {_name(path)}, where params has no leaf;"
                " expected shardings with the structure of params, or of its upper part."
            )
    return placed, first[1].mesh


def axes_beside(
    shape: tuple[int, ...], whole: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh
) -> Axes:
    """The axes that split an array of the state, for those that split its parameter.

    A dimension that is shorter than the parameter's has one number for each block of its elements,
    and is split if no shard has a part of a block.
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
    """The axes that a `PartitionSpec` names for each of so many dimensions."""
    names = tuple(spec) + (None,) * (dimensions - len(spec))
    return tuple((n,) if isinstance(n, str) else tuple(n or ()) for n in names)


def zeros_beside(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros that lie where a parameter lies, and are split as it is where that cuts no block.

    Args:
      leaf: the parameter.
      like: the shape and dtype of the zeros.
    """
    if like.shape == jnp.shape(leaf):
        return jnp.zeros_like(leaf, like.dtype)
    traced = isinstance(leaf, Tracer)
    device = None
    if traced or getattr(leaf, "committed", False):
        # What is traced says in its type along which explicit axes of a mesh it is split.
        device = jax.typeof(leaf).sharding if traced else leaf.sharding
    if isinstance(device, NamedSharding):
        axes: Axes = ()
        if len(like.shape) == leaf.ndim:
            whole = axes_of_spec(device.spec, leaf.ndim)
            axes = axes_beside(like.shape, leaf.shape, whole, device.mesh)
        device = NamedSharding(device.mesh, spec_of(axes), memory_kind=device.memory_kind)
        if traced and not any(axes):
            device = None
    elif device is not None and len(device.device_set) > 1:
        device = None  # a sharding of the parameter's own shape
    zeros = jnp.zeros(like.shape, like.dtype, device=device)
    return vary_together([zeros, leaf])[0] if traced else zeros


def _axes_on(caller: str, path: Path, leaf: Any, sharding: NamedSharding) -> Axes:
    """The axes that split a parameter, checked."""
    axes = axes_of_spec(sharding.spec, leaf.ndim)
    if len(axes) > leaf.ndim or any(
        n % size(names, sharding.mesh) for n, names in zip(leaf.shape, axes, strict=True)
    ):
        raise ValueError(
            f"{caller}: the parameter at {_name(path)} is {describe(leaf)}, and its"
            f" sharding is {sharding.spec} on a mesh of {_sizes(sharding.mesh)}; expected at most"
            " one entry a dimension, and axes whose sizes divide it."
        )
    return axes


def _sizes(mesh: Mesh | AbstractMesh) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def _name(path: Path) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _describe(sharding: Any) -> str:
    name = type(sharding).__name__
    return f"the spec {sharding}" if isinstance(sharding, PartitionSpec) else f"a {name}"


def _is_none(leaf: Any) -> bool:
    return leaf is None
