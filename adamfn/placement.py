"""Where the parameters are, in a form to reason about, and what is wrong if they cannot be."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from adamfn.trees import PyTree, describe

Path: TypeAlias = tuple[Any, ...]
Axes: TypeAlias = tuple[tuple[str, ...], ...]
"""For each dimension of an array, the mesh axes that split it."""


class Placed(NamedTuple):
    """A parameter, and where it is."""

    shape: tuple[int, ...]
    axes: Axes
    memory_kind: str | None


def size(names: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices these axes split a dimension."""
    return math.prod(mesh.shape[name] for name in names)


def place(params: PyTree, shardings: PyTree) -> tuple[dict[Path, Placed], Mesh | AbstractMesh]:
    """Where each parameter is, by its path, and the mesh that all are on.

    Raises:
      ValueError, TypeError: as `state_shardings`.
    """
    given = cast("dict[Path, Any]", dict(jax.tree.leaves_with_path(shardings)))
    for path, sharding in given.items():
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"state_shardings: shardings at {_name(path)} is {_describe(sharding)}; expected a"
                " jax.sharding.NamedSharding, which knows its mesh."
            )
    first = next(iter(given.items()), None)
    if first is None:
        raise ValueError(
            "state_shardings: shardings has no leaves; expected a NamedSharding for each parameter,"
            " or one for all of them, such as NamedSharding(mesh, PartitionSpec())."
        )
    for path, sharding in given.items():
        if sharding.mesh != first[1].mesh:
            raise ValueError(
                f"state_shardings: the sharding at {_name(path)} is on {sharding.mesh}, and that at"
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
                f"state_shardings: found no sharding for the parameter at {_name(path)},"
                f" {describe(leaf)}; expected a NamedSharding there or above it. Make them from"
                " params: jax.tree.map(lambda p: NamedSharding(mesh, ...), params)."
            )
        sharding = given[head]
        placed[path] = Placed(leaf.shape, _axes_on(path, leaf, sharding), sharding.memory_kind)
    for path in given:
        if path and path not in used:
            raise ValueError(
                f"state_shardings: found a sharding at {_name(path)}, where params has no leaf;"
                " expected shardings with the structure of params, or of its upper part."
            )
    return placed, first[1].mesh


def _axes_on(path: Path, leaf: Any, sharding: NamedSharding) -> Axes:
    """The axes that split a parameter, checked."""
    spec = tuple(sharding.spec) + (None,) * (leaf.ndim - len(sharding.spec))
    axes = tuple((n,) if isinstance(n, str) else tuple(n or ()) for n in spec)
    if len(axes) > leaf.ndim or any(
        n % size(names, sharding.mesh) for n, names in zip(leaf.shape, axes, strict=True)
    ):
        raise ValueError(
            f"state_shardings: the parameter at {_name(path)} is {describe(leaf)}, and its"
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
