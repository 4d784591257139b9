# SPDX-License-Identifier: Apache-2.0
"""Where arrays are on a mesh: parameters, the state beside them, and what `shard_map` asks of both.

Inside `jax.shard_map` an array's type says over which axes of the mesh its value may vary.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamfn.trees import PyTree, described, shown

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
    axes: Axes  # the mesh axes that split each dimension of its moments
    home: Axes
    """Likewise of the updates. So are parameters, unless explicit axes split them otherwise."""


def size(names: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices these axes split a dimension."""
    return math.prod(mesh.shape[name] for name in names)


def place(
    caller: str, params: PyTree, shardings: PyTree, zero_axis: str | None, *, all_used: bool = True
) -> tuple[dict[Path, Placed], Mesh | AbstractMesh]:
    """Where each parameter is, by its path, and their mesh; otherwise as `state_shardings`."""
    given: dict[Path, Any] = dict(jax.tree.leaves_with_path(shardings))
    leaves: list[tuple[Path, Any]] = jax.tree.leaves_with_path(params, is_leaf=lambda x: x is None)
    heads = {
        path: next((path[:k] for k in range(len(path) + 1) if path[:k] in given), None)
        for path, _ in leaves
    }
    wrong = [] if given else ["no leaves in shardings"]
    wrong += [
        f"no sharding for the parameter at {_name(path)}, {described(leaf)}"
        for path, leaf in leaves
        if heads[path] is None and leaf is not None
    ]
    unused = {*given} - {(), *heads.values()} if all_used else set[Path]()
    wrong += [f"a sharding at {_name(path)}, where params has no leaf" for path in unused]
    if wrong:
        raise ValueError(
            f"{caller}: found {wrong[0]}; expected shardings with the structure of params, or of"
            " its upper part: jax.tree.map(lambda p: NamedSharding(mesh, ...), params)."
        )
    first: Any = next(iter(given.values()))
    for path, sharding in given.items():
        is_named = isinstance(sharding, NamedSharding)
        if not is_named or sharding.mesh != first.mesh:
            raise (ValueError if is_named else TypeError)(
                f"{caller}: the sharding at {_name(path)} is {shown(sharding)}; expected a"
                " jax.sharding.NamedSharding, on one mesh for all of them. The parameters come"
                " first, then their shardings."
            )
    mesh: Mesh | AbstractMesh = first.mesh
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    if zero_axis is not None and zero_axis not in mesh.shape:
        raise ValueError(f"{caller}: zero_axis is {shown(zero_axis)}; expected an axis of {sizes}.")
    placed: dict[Path, Placed] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        sharding = given[heads[path] or ()]
        axes = axes_of_spec(sharding.spec, leaf.ndim)
        if len(axes) > leaf.ndim or any(map(lambda n, x: n % size(x, mesh), leaf.shape, axes)):
            raise ValueError(
                f"{caller}: the parameter at {_name(path)} is {described(leaf)}, and its sharding"
                f" is {sharding.spec} on a mesh of {sizes}; expected at most one entry a dimension,"
                " and axes whose sizes divide it."
            )
        placed[path] = Placed(leaf.shape, axes, sharding.memory_kind)
    return placed, mesh


def axes_beside(
    shape: tuple[int, ...], whole: tuple[int, ...], axes: Axes, mesh: Mesh | AbstractMesh
) -> Axes:
    """The axes that split an array of the state, given the axes that split its parameter.

    A dimension shorter than the parameter's has an entry for each block of elements. It is split if
    no shard has a part of a block.
    """
    return tuple(
        names if n == m or (n > 0 and m % n == 0 and n % size(names, mesh) == 0) else ()
        for n, m, names in zip(shape, whole, axes, strict=True)
    )


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


def on_mesh_of(leaf: Any) -> AbstractContextManager[Any]:
    """The mesh of a traced array's explicit axes, which JAX 0.12 does not split new arrays over."""
    mesh = jax.typeof(leaf).sharding.mesh
    missing = isinstance(leaf, Tracer) and jax.sharding.get_abstract_mesh().empty
    return jax.sharding.use_abstract_mesh(mesh) if missing and not mesh.empty else nullcontext()


def zeros_beside(leaf: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of another shape and dtype beside a parameter, split as it is if this cuts no block."""
    if like.shape == jnp.shape(leaf):
        return jnp.zeros_like(leaf, like.dtype)
    traced, fits = isinstance(leaf, Tracer), len(like.shape) == jnp.ndim(leaf)
    # The type of a traced array says which explicit axes of a mesh split it.
    device = jax.typeof(leaf).sharding if traced else getattr(leaf, "sharding", None)
    if not traced and not getattr(leaf, "committed", False):
        device = None
    elif isinstance(device, NamedSharding):
        whole = axes_of_spec(device.spec, leaf.ndim)
        axes = axes_beside(like.shape, leaf.shape, whole, device.mesh) if fits else ()
        known = any(whole) or AxisType.Manual in device.mesh.axis_types
        whole_blocks = fits and all(map(lambda m, n: m > 0 and n % m == 0, like.shape, leaf.shape))
        if traced and whole_blocks and not known:
            # XLA splits what is made of a leaf as it splits the leaf.
            blocks = [k for m, n in zip(like.shape, leaf.shape, strict=True) for k in (m, n // m)]
            first_of_each = leaf.reshape(blocks)[(slice(None), 0) * leaf.ndim]
            return jnp.where(first_of_each == 0, jnp.zeros((), like.dtype), 0)
        split = NamedSharding(device.mesh, spec_of(axes), memory_kind=device.memory_kind)
        device = split if any(axes) or not traced else None
    elif device is not None and len(device.device_set) > 1:
        device = None  # a sharding of this one shape
    zeros = jnp.zeros(like.shape, like.dtype, device=device)
    return vary_together([zeros, leaf])[0] if traced else zeros


def axes_of(x: Any) -> frozenset[Any]:
    """The mesh axes over which an array may vary; none outside `jax.shard_map`."""
    kind: Any = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # vma: jax 0.8


def vary_together(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, each varying over every axis that one of them varies over."""
    every = frozenset[Any]().union(*map(axes_of, arrays))
    return [_vary(x, every) for x in arrays]


def with_type_of(new: Any, old: Any) -> jax.Array:
    """A scalar of the next state, with the type that it had in the last; a copy of the caller's."""
    return _vary(jnp.array(new, jnp.result_type(old)), axes_of(old))


def shape_like(x: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that has the array's shape and varies as it does."""
    kind: Any = jax.typeof(x)
    manual = {"manual_axis_type": kind.mat} if hasattr(kind, "mat") else {"vma": kind.vma}
    return jax.ShapeDtypeStruct(x.shape, dtype, **manual)


def _vary(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    missing = tuple(axes - axes_of(x))
    lax: Any = jax.lax  # 0.8.0 has no pcast yet
    if not missing:
        return x
    return lax.pcast(x, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, missing)


def _name(path: Path) -> str:
    return jax.tree_util.keystr(path) or "the root"
