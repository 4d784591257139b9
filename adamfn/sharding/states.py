"""Where an optimizer's state lives on a mesh of devices."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from adamfn.chains.transform import GradientTransformation
from adamfn.core.placement import Axes, Path, Placed, axes_beside, place, size, spec_of
from adamfn.formats.arrangement import holds_moments, kept_leaves, scales_key
from adamfn.trees import PyTree


def state_shardings(
    tx: GradientTransformation,
    params: PyTree,
    shardings: PyTree,
    zero_axis: str | None = None,
    *,
    memory_kind: str | None = None,
) -> PyTree:
    """The shardings of a transformation's state, for those of its parameters.

    An array of the state belongs to the parameter at the end of whose path it stands, as
    `[0].mu['w']` does to `['w']`, and the scales of a leaf's moments belong to the same. It is
    split as that parameter is. Where its dimension is shorter, as those of the scales of blocks
    are, it is split likewise if that cuts no block, and else not. Scalars, and what belongs to no
    parameter, such as the buffers of `adamfn.packed`, are on every device.

    With `zero_axis` whatever belongs to a parameter is split further, along that mesh axis, over
    the dimension that leaves least of it on a device; where none divides, it stays. With
    parameters that are the same along the axis this is ZeRO's stage 1.

    Args:
      tx: any transformation, ours or optax's, a chain or a wrapper.
      params: the parameters, or their shapes and dtypes (`jax.eval_shape`): nothing is computed.
      shardings: a `NamedSharding` for each parameter, or for each subtree of them; one serves all.
      zero_axis: the name of a mesh axis, usually the one that the batch is split along.
      memory_kind: where what belongs to parameters is kept, such as `"pinned_host"`; None for the
        device's own memory. A step has to bring it to the device and back.

    Returns:
      A tree of `NamedSharding`s with the structure of `tx.init(params)`, for `in_shardings` and
      `out_shardings` of `jax.jit`, for `jax.device_put`, and for restoring checkpoints.

    Raises:
      ValueError: `shardings` does not match `params`, or cannot split them, or spans several
        meshes; the mesh has no such axis, or its devices no such memory.
      TypeError: something in `shardings` is not a `NamedSharding`.

    References:
      Rajbhandari, Rasley, Ruwase and He, ZeRO: Memory Optimizations Toward Training Trillion
      Parameter Models, 2020 (arXiv 1910.02054), section 5.1.

    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from adamfn.sharding import state_shardings
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
    >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    >>> specs = {"w": jax.NamedSharding(mesh, jax.P(None, "model"))}
    >>> tx = adamfn.adamw(1e-3, moments="8bit")
    >>> shardings = state_shardings(tx, params, specs, zero_axis="data")
    >>> print(tuple(shardings[0].mu["w"].spec), tuple(shardings[0].count.spec))
    ('data', 'model') ()
    >>> state = jax.jit(tx.init, out_shardings=shardings)({"w": jnp.zeros((512, 1024))})
    """
    placed, mesh = place("state_shardings", params, shardings)
    if memory_kind is not None:
        _check_memory(mesh, memory_kind)
    shapes = jax.eval_shape(tx.init, params)
    owners, placed = with_zero("state_shardings", shapes, placed, zero_axis, mesh)
    return shardings_of(shapes, owners, placed, mesh, memory_kind)


def shardings_of(
    state: PyTree,
    owners: Sequence[Path | None],
    placed: Mapping[Path, Placed],
    mesh: Mesh | AbstractMesh,
    memory_kind: str | None = None,
) -> PyTree:
    """The shardings of a state whose arrays belong to parameters that are placed so."""

    def sharding_of(owner: Path | None, array: Any) -> NamedSharding:
        if owner is None or len(array.shape) != len(placed[owner].shape):
            return NamedSharding(mesh, PartitionSpec())
        whole = placed[owner]
        axes = axes_beside(array.shape, whole.shape, whole.axes, mesh)
        return NamedSharding(mesh, spec_of(axes), memory_kind=memory_kind or whole.memory_kind)

    arrays, treedef = jax.tree.flatten(state)
    return treedef.unflatten(map(sharding_of, owners, arrays))


def with_zero(
    caller: str,
    state: PyTree,
    placed: Mapping[Path, Placed],
    zero_axis: str | None,
    mesh: Mesh | AbstractMesh,
) -> tuple[list[Path | None], dict[Path, Placed]]:
    """The parameter of each array of a state, and how what is kept of each parameter is split."""
    if zero_axis is not None and zero_axis not in mesh.axis_names:
        raise ValueError(
            f"{caller}: zero_axis is {zero_axis!r}; expected an axis of the mesh, which has"
            f" {', '.join(map(repr, mesh.axis_names))}."
        )
    leaves: list[tuple[Path, Any]] = jax.tree.leaves_with_path(state)
    owners, split = _owners(leaves, placed, _leaf_of_scales(state)), dict(placed)
    kept: defaultdict[Path, list[Any]] = defaultdict(list)
    for owner, (_, array) in zip(owners, leaves, strict=True):
        if owner is not None and len(array.shape) == len(placed[owner].shape):
            kept[owner].append(array)
    if zero_axis is not None:
        for owner, arrays in kept.items():
            axes = split_further(placed[owner], zero_axis, arrays, mesh)
            split[owner] = placed[owner]._replace(axes=axes)
    return owners, split


def _leaf_of_scales(state: PyTree) -> dict[Path, Path]:
    """For the path of each array of scales, the path of an array that is kept of the same leaf."""
    found: dict[Path, Path] = {}
    nodes: list[tuple[Path, Any]] = jax.tree.leaves_with_path(state, is_leaf=holds_moments)
    for where, node in nodes:
        if not holds_moments(node) or not hasattr(node, "scales"):
            continue
        entries: list[tuple[Path, Any]] = jax.tree.leaves_with_path(node.scales)
        leaves = {scales_key(leaf.path): leaf for leaf in kept_leaves(node)}
        for inner, _ in entries:
            if not inner:
                continue
            leaf = leaves[inner[0].key]
            field = next(name for name, part in leaf.parts.items() if part is not None)
            scales = (*where, GetAttrKey("scales"), *inner)
            found[scales] = (*where, GetAttrKey(field), *leaf.path)
    return found


def _owners(
    state: Sequence[tuple[Path, Any]],
    placed: Mapping[Path, Placed],
    leaf_of_scales: Mapping[Path, Path],
) -> list[Path | None]:
    """The parameter that each array of a state belongs to, by its path; None for the others.

    Scales belong to the parameter of their leaf. Any other array's parameter has a path that is a
    part of the array's. Of several, its own shape counts most; then how many of the parameters the
    state has in the same place, so that an entry of a chain is not taken for one of a list of
    parameters; then the longest path, then the last.
    """
    found: list[list[tuple[Path, Path]]] = []
    beside: defaultdict[Path, set[Path]] = defaultdict(set)
    for path, array in state:
        parts: list[tuple[Path, Path]] = [
            (path[:begin], path[begin:end])
            for begin in range(len(path) + 1)
            for end in range(begin, len(path) + 1)
            if path not in leaf_of_scales
            and path[begin:end] in placed
            and _fits(array.shape, placed[path[begin:end]].shape)
        ]
        found.append(parts)
        for where, parameter in parts:
            beside[where].add(parameter)

    def rank(shape: tuple[int, ...], where: Path, parameter: Path) -> tuple[int, ...]:
        same_shape = shape == placed[parameter].shape
        return same_shape, len(beside[where]), len(parameter), len(where)

    owners = {
        path: max(parts, key=lambda part, shape=array.shape: rank(shape, *part))[1]
        for (path, array), parts in zip(state, found, strict=True)
        if parts
    }
    return [owners.get(leaf_of_scales.get(path, path)) for path, _ in state]


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) == len(whole) > 0 and all(n <= m for n, m in zip(shape, whole, strict=True))


def split_further(
    placed: Placed, axis: str, arrays: Sequence[Any], mesh: Mesh | AbstractMesh
) -> Axes:
    """The parameter's axes with one more: rather where it cuts no block, and leaves least."""
    if any(axis in names for names in placed.axes):
        return placed.axes
    candidates = [
        (*placed.axes[:d], (*placed.axes[d], axis), *placed.axes[d + 1 :])
        for d, n in enumerate(placed.shape)
        if n % size((*placed.axes[d], axis), mesh) == 0
    ]

    def bytes_on_a_device(axes: Axes) -> int:
        return sum(
            array.dtype.itemsize
            * math.prod(array.shape)
            // math.prod(size(n, mesh) for n in axes_beside(array.shape, placed.shape, axes, mesh))
            for array in arrays
        )

    def cuts_blocks(axes: Axes) -> bool:
        """Whether numbers of blocks, which are along the last axis, are not split with it."""
        return axes[-1] != placed.axes[-1] and any(
            array.shape[:-1] == placed.shape[:-1]
            and axes_beside(array.shape, placed.shape, axes, mesh)[-1] != axes[-1]
            for array in arrays
        )

    return min(
        candidates,
        key=lambda axes: (cuts_blocks(axes), bytes_on_a_device(axes)),
        default=placed.axes,
    )


def _check_memory(mesh: Mesh | AbstractMesh, kind: str) -> None:
    if isinstance(mesh, AbstractMesh):
        return
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"state_shardings: memory_kind is {kind!r}, which the {device.platform} backend does"
            f" not have; expected one of {', '.join(map(repr, kinds))}, or None."
        )
