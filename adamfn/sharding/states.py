"""`state_shardings`: where an optimizer's state is on a mesh of devices."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from adamfn.chains.transform import GradientTransformation
from adamfn.core.placement import Axes, Path, Placed, axes_beside, place, size, spec_of
from adamfn.formats.arrangement import scales_key
from adamfn.trees import PyTree

_MOMENTS = GetAttrKey("mu"), GetAttrKey("nu")
_SCALES = GetAttrKey("scales")


def state_shardings(
    tx: GradientTransformation,
    params: PyTree,
    shardings: PyTree,
    zero_axis: str | None = None,
    *,
    memory_kind: str | None = None,
) -> PyTree:
    """Says how a transformation's state is split, given how its parameters are.

    An array of the state belongs to the parameter at the end of its path: `[0].mu['w']` belongs to
    `['w']`, and so do the scales of that leaf. It is split as its parameter is. A dimension that is
    shorter, as in the scales of blocks, is split if this cuts no block. Scalars, and arrays of no
    parameter, such as the buffers of `adamfn.packed`, are replicated.

    With `zero_axis`, arrays of a parameter are split further, along that mesh axis, over the
    dimension that leaves least on a device, if it divides one. With parameters that are replicated
    along the axis this is ZeRO's stage 1.

    Args:
      tx: any transformation, ours or optax's, a chain or a wrapper.
      params: the parameters, or their shapes and dtypes (`jax.eval_shape`): nothing is computed.
      shardings: a `NamedSharding` for each parameter, or for each subtree of them; one serves all.
      zero_axis: the name of a mesh axis, usually that of the batch.
      memory_kind: where arrays of parameters are kept, such as `"pinned_host"`; None for the
        device's memory. A step has to bring them to the device and back.

    Returns:
      A tree of `NamedSharding`s with the structure of `tx.init(params)`, for `in_shardings` and
      `out_shardings` of `jax.jit`, for `jax.device_put`, and for restoring checkpoints.

    Raises:
      ValueError, TypeError: `shardings` are not `NamedSharding`s on one mesh that match `params`
        and can split them; the mesh has no such axis, or its devices no such memory.

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
    if memory_kind is not None and isinstance(mesh, Mesh):
        _check_memory(mesh, memory_kind)
    state = jax.eval_shape(tx.init, params)
    return shardings_of("state_shardings", state, placed, mesh, zero_axis, memory_kind)[0]


def shardings_of(
    caller: str,
    state: PyTree,
    placed: Mapping[Path, Placed],
    mesh: Mesh | AbstractMesh,
    zero_axis: str | None,
    memory_kind: str | None = None,
) -> tuple[PyTree, dict[Path, Axes]]:
    """The shardings of a state, and the axes that split what it holds of each parameter."""
    if zero_axis is not None and zero_axis not in mesh.axis_names:
        raise ValueError(
            f"{caller}: zero_axis is {zero_axis!r}; expected an axis of the mesh, which has"
            f" {', '.join(map(repr, mesh.axis_names))}."
        )
    leaves: list[tuple[Path, Any]] = jax.tree.leaves_with_path(state)
    owners = _owners(leaves, placed)
    of_parameter: defaultdict[Path, list[Any]] = defaultdict(list)
    for owner, (_, array) in zip(owners, leaves, strict=True):
        if owner is not None:
            of_parameter[owner].append(array)
    split = {path: parameter.axes for path, parameter in placed.items()}
    for owner, arrays in of_parameter.items():
        if zero_axis is not None:
            split[owner] = split_further(placed[owner], zero_axis, arrays, mesh)

    def sharding_of(owner: Path | None, array: Any) -> NamedSharding:
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        axes = axes_beside(array.shape, placed[owner].shape, split[owner], mesh)
        kind = memory_kind or placed[owner].memory_kind
        return NamedSharding(mesh, spec_of(axes), memory_kind=kind)

    arrays, treedef = jax.tree.flatten(state)
    return treedef.unflatten(map(sharding_of, owners, arrays)), split


def _owners(state: Sequence[tuple[Path, Any]], placed: Mapping[Path, Placed]) -> list[Path | None]:
    """The parameter that each array of a state belongs to; None if there is none of its rank.

    Scales belong with the moments of the leaf that their key names. The path of another array
    contains its parameter's. Of several parameters: those of the array's shape first; then those
    beside most other parameters, so that an entry of a chain is not taken for one of a list of
    parameters; then the longest path; then the last.
    """
    named: dict[tuple[Path, Any], Path] = {
        (path[:k], scales_key(path[k + 1 :])): path
        for path, _ in state
        for k, entry in enumerate(path)
        if entry in _MOMENTS
    }

    def moments_of(path: Path) -> Path:
        k = path.index(_SCALES) if _SCALES in path[:-1] else len(path)
        key = getattr(path[k + 1], "key", None) if k < len(path) else None
        return named.get((path[:k], key), path)

    candidates: dict[Path, list[tuple[bool, Path, Path]]] = {}
    beside: defaultdict[Path, set[Path]] = defaultdict(set)
    for path, array in state:
        spans = combinations_with_replacement(range(len(path) + 1), 2)
        candidates[path] = [
            (array.shape == placed[path[a:b]].shape, path[:a], path[a:b])
            for a, b in (spans if moments_of(path) == path else ())
            if path[a:b] in placed and _fits(array.shape, placed[path[a:b]].shape)
        ]
        for _, where, parameter in candidates[path]:
            beside[where].add(parameter)

    def rank(candidate: tuple[bool, Path, Path]) -> tuple[int, ...]:
        same_shape, where, parameter = candidate
        return same_shape, len(beside[where]), len(parameter), len(where)

    owners: list[Path | None] = []
    for path, array in state:
        found = candidates.get(moments_of(path))
        owner = max(found, key=rank)[2] if found else None
        of_its_rank = owner is not None and len(array.shape) == len(placed[owner].shape)
        owners.append(owner if of_its_rank else None)
    return owners


def _fits(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) == len(whole) > 0 and all(n <= m for n, m in zip(shape, whole, strict=True))


def split_further(
    placed: Placed, axis: str, arrays: Sequence[Any], mesh: Mesh | AbstractMesh
) -> Axes:
    """The parameter's axes with one more: where it cuts no block if possible, then by size."""
    if any(axis in names for names in placed.axes):
        return placed.axes
    candidates = [
        (*placed.axes[:d], (*placed.axes[d], axis), *placed.axes[d + 1 :])
        for d, n in enumerate(placed.shape)
        if n % size((*placed.axes[d], axis), mesh) == 0
    ]

    def cost(axes: Axes) -> tuple[bool, int]:
        """Whether scales of blocks, along the last axis, are not split with it; bytes a device."""
        cuts, total = False, 0
        for array in arrays:
            beside = axes_beside(array.shape, placed.shape, axes, mesh)
            parts = math.prod(size(names, mesh) for names in beside)
            total += array.dtype.itemsize * math.prod(array.shape) // parts
            cuts |= array.shape[:-1] == placed.shape[:-1] and beside[-1] != axes[-1]
        return cuts and axes[-1] != placed.axes[-1], total

    return min(candidates, key=cost, default=placed.axes)


def _check_memory(mesh: Mesh, kind: str) -> None:
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"state_shardings: memory_kind is {kind!r}, which the {device.platform} backend does"
            f" not have; expected one of {', '.join(map(repr, kinds))}, or None."
        )
