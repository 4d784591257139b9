# SPDX-License-Identifier: Apache-2.0
"""`state_shardings`: where an optimizer's state is on a mesh of devices."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

from adamfn.chains.transform import GradientTransformation, check_transformation
from adamfn.core.placement import Axes, Path, Placed, Shards, axes_beside, place, size, spec_of
from adamfn.formats.arrangement import scales_key
from adamfn.trees import PyTree

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

    Args:
      tx: any transformation, ours or optax's, a chain or a wrapper.
      params: the parameters, or their shapes and dtypes (`jax.eval_shape`): nothing is computed.
      shardings: a `NamedSharding` for each parameter, or for each subtree of them; one serves all.
      zero_axis: a mesh axis, usually that of the batch. The dimension of an array that leaves least
        on a device is split along it too, if it divides one. With replicated parameters this is
        stage 1 of ZeRO (Rajbhandari et al., 2020, section 5.1, arXiv 1910.02054).
      memory_kind: where arrays of parameters are kept, such as `"pinned_host"`; None for the
        device's memory. A step has to bring them to the device and back.

    Returns:
      A tree of `NamedSharding`s with the structure of `tx.init(params)`, for `jax.jit`, for
      `jax.device_put`, and for restoring checkpoints.

    Raises:
      ValueError, TypeError: `shardings` are not `NamedSharding`s on one mesh that match `params`
        and can split them; the mesh has no such axis, or its devices no such memory.

    >>> import adamfn, jax, jax.numpy as jnp
    >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
    >>> params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    >>> specs = {"w": jax.NamedSharding(mesh, jax.P(None, "model"))}
    >>> tx = adamfn.adamw(moments="8bit")
    >>> where = adamfn.sharding.state_shardings(tx, params, specs, zero_axis="data")
    >>> print(tuple(where[0].mu["w"].spec), tuple(where[0].count.spec))
    ('data', 'model') ()
    >>> state = jax.jit(tx.init, out_shardings=where)({"w": jnp.zeros((512, 1024))})
    """
    check_transformation("state_shardings(tx, params, shardings): tx", tx)
    return lay_out("state_shardings", tx.init, params, shardings, zero_axis, memory_kind)[0]


def lay_out(
    caller: str,
    init: Callable[[PyTree], PyTree],
    params: PyTree,
    shardings: PyTree,
    zero_axis: str | None,
    memory_kind: str | None = None,
    *,
    all_used: bool = True,
) -> tuple[PyTree, dict[Path, Shards]]:
    """The shardings of a state, and how each parameter is split for its step."""
    placed, mesh = place(caller, params, shardings, zero_axis, all_used=all_used)
    state = jax.eval_shape(init, params)
    arrays: dict[Path, Any] = dict(jax.tree.leaves_with_path(state))
    owners = _owners(arrays, placed)
    of_parameter: defaultdict[Path, list[Any]] = defaultdict(list)
    for path, owner in owners.items():
        of_parameter[owner].append(arrays[path])
    split = {
        path: Shards(mesh, split_further(own, zero_axis, of_parameter[path], mesh), own.axes)
        for path, own in placed.items()
    }

    def sharding_of(path: Path, array: Any) -> NamedSharding:
        if path not in owners:
            return NamedSharding(mesh, PartitionSpec())
        owner = owners[path]
        axes = axes_beside(array.shape, placed[owner].shape, split[owner].axes, mesh)
        kind = memory_kind or placed[owner].memory_kind
        return NamedSharding(mesh, spec_of(axes), memory_kind=kind)

    return jax.tree.map_with_path(sharding_of, state), split


def _owners(arrays: Mapping[Path, Any], placed: Mapping[Path, Placed]) -> dict[Path, Path]:
    """The parameter whose path ends an array's, or the key of its scales."""
    paths, keys = {path: path for path in placed}, {scales_key(path): path for path in placed}
    owners: dict[Path, Path] = {}
    for path, array in arrays.items():
        found: list[Path | None] = []
        if _SCALES in path[:-1]:  # a state's, or a parameter's own attribute
            parts = str(getattr(path[path.index(_SCALES) + 1], "key", "")).split("/")
            found = [keys.get("/".join(parts[k:])) for k in range(len(parts))]
        found += [paths.get(path[k:]) for k in range(len(path) + 1)]
        owner = next((owner for owner in found if owner is not None), None)
        if owner is not None and 0 < array.ndim == len(placed[owner].shape):
            owners[path] = owner
    return owners


def split_further(
    placed: Placed, axis: str | None, arrays: Sequence[Any], mesh: Mesh | AbstractMesh
) -> Axes:
    """The parameter's axes with one more: where it cuts no block if possible, then by size."""
    if axis is None or not arrays or any(axis in names for names in placed.axes):
        return placed.axes
    candidates = [
        (*placed.axes[:d], (*placed.axes[d], axis), *placed.axes[d + 1 :])
        for d, n in enumerate(placed.shape)
        if n % size((*placed.axes[d], axis), mesh) == 0
    ]

    def cost(axes: Axes) -> tuple[bool, int]:
        """Whether it cuts blocks along the last axis; then the bytes on a device."""
        cuts, total = False, 0
        for x in arrays:
            beside = axes_beside(x.shape, placed.shape, axes, mesh)
            cuts |= x.shape[:-1] == placed.shape[:-1] and beside[-1] != axes[-1]
            total += x.dtype.itemsize * x.size // size(sum(beside, ()), mesh)
        return cuts and axes[-1] != placed.axes[-1], total

    return min(candidates, key=cost, default=placed.axes)
