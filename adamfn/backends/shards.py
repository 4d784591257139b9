"""Leaves that are split over a mesh: each shard takes its step by itself, inside `jax.shard_map`.

So native code and kernels, which XLA cannot partition, run on the shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamfn.backends.primitive import Backend, bind
from adamfn.core.bundle import Bundle
from adamfn.core.placement import Axes, Path, axes_beside, axes_of_spec, size, spec_of
from adamfn.core.program import Call, Program
from adamfn.formats.elements import strides_of
from adamfn.formats.shards import block_of, cut_block, on_shards
from adamfn.trees import PyTree, describe, path_name


@dataclass(frozen=True)
class Shards:
    """How a leaf is split for its step."""

    mesh: Mesh | AbstractMesh
    axes: Axes
    """The mesh axes along which each dimension of what is kept of it is split."""
    home: Axes | None = None
    """Likewise of the parameter, where results belong; None for where their operands are."""


def split_leaves(
    given: Mapping[Path, Shards] | None,
    tree: PyTree,
    programs: Sequence[Program],
    grads: Sequence[Any],
    params: Sequence[Any],
    kept: Sequence[Any],
) -> list[Shards | None]:
    """How every leaf is split for its step, if its shards can take it each by itself.

    Args:
      given: how leaves are split, by their paths; None to take it from the arrays' types, which
        say it where the axes of a mesh are explicit.
      tree: the tree of the leaves.
      programs: the program of every leaf.
      grads: its gradient.
      params: its parameter, or None.
      kept: what is kept of it.

    Returns:
      Of each leaf how it is split; None where its program looks at the whole leaf for more than a
      mean, or stores it in a format that is not ours, or a mesh has axes of several types: XLA
      runs it, and sends what it has to.

    Raises:
      ValueError: a shard would have a part of a block; names the leaf.
    """
    found: list[Shards | None] = []
    leaves = jax.tree.leaves_with_path(tree)
    for (path, _), program, g, p, own in zip(leaves, programs, grads, params, kept, strict=True):
        shards = _by_type(g, p, own) if given is None else given.get(path)
        found.append(shards if shards and _can_split(path, program, g, shards) else None)
    return found


def _can_split(path: Path, program: Program, g: Any, shards: Shards) -> bool:
    if len(set(shards.mesh.axis_types)) > 1:  # some are in the types of arrays, and some are not
        return False
    last = size(shards.axes[-1], shards.mesh) if shards.axes else 1
    active = [part for part in program.parts if part.active]
    if not all(part.elementwise and (last == 1 or not part.rests) for part in active):
        return False
    blocks = [block_of(part.format) for part in active]
    if None in blocks:
        return False
    for part, block in zip(active, blocks, strict=True):
        cut = cut_block(block or 0, g.shape, last)
        if cut is not None and shards.home is None and g.shape[-1] <= cut:
            return False  # JAX can reshape what is split within the one block of a row
        if cut is not None:
            raise ValueError(
                f"{part.name}: the leaf at {path_name(path) or 'the root'} is {describe(g)}, and"
                f" what is kept of it is split as {spec_of(shards.axes)}: a device has"
                f" {g.shape[-1] / last:g} of its last axis, which cuts blocks of {cut}. Choose"
                " blocks that fit, with moments=adamfn.sharding.whole_blocks(moments, params,"
                " shardings, zero_axis), or split another axis."
            )
    return True


def _by_type(g: Any, p: Any, kept: Any) -> Shards | None:
    """How a leaf is split that is of a mesh whose axes are all explicit."""
    if isinstance(g, Bundle) or not _is_explicit(_sharding_in_type(g).mesh):
        return None
    arrays = [x for x in jax.tree.leaves((kept, p, g)) if jnp.shape(x) == g.shape]
    found = next(own for own in map(_sharding_in_type, arrays) if _is_explicit(own.mesh))
    return Shards(found.mesh, axes_of_spec(found.spec, g.ndim))


def _sharding_in_type(x: Any) -> Any:
    return jax.typeof(x).sharding


def run_on_shards(
    call: Call, backend: Backend, shards: Shards, operands: Sequence[jax.Array]
) -> list[jax.Array]:
    """`bind` of a call whose leaves are split alike, on each of their shards."""
    vector, count, numbers, *arrays = operands
    mesh, axes = shards.mesh, shards.axes
    kept, moved = arrays[: call.arrays_kept], arrays[call.arrays_kept :]
    rows = jax.tree.unflatten(call.kept, kept)
    strides = tuple(strides_of(g.shape) for g in moved[: call.leaves])

    def on_a_shard(
        vector: jax.Array, count: jax.Array, numbers: jax.Array, arrays: list[jax.Array]
    ) -> list[jax.Array]:
        parts = arrays[call.arrays_kept :][: call.leaves]
        firsts = [_first_number(of, x, axes) for of, x in zip(strides, parts, strict=True)]
        numbers = jnp.stack([numbers[:, 0], jnp.stack(firsts)], axis=1)
        return bind(of_a_shard, backend, [vector, count, numbers, *arrays], axes)

    def spec(x: jax.Array, leaf: jax.Array) -> PartitionSpec:
        fits = x.ndim == leaf.ndim
        return spec_of(axes_beside(x.shape, leaf.shape, axes, mesh)) if fits else PartitionSpec()

    split = axes if any(axes) else ()
    parts = [replace(part, format=on_shards(part.format, split)) for part in call.program.parts]
    program = replace(call.program, parts=tuple(parts))
    of_a_shard = replace(call, program=program, strides=strides if split else None)
    specs = [spec(x, g) for row, g in zip(rows, moved, strict=False) for x in jax.tree.leaves(row)]
    specs += [spec_of(axes)] * len(moved)
    updates = moved[: call.leaves] if program.update_dtype is not None else []
    like = [*kept, *updates, *(moved[call.leaves :] if program.moves else [])]
    everywhere = PartitionSpec()
    results = jax.shard_map(
        on_a_shard,
        mesh=mesh,
        in_specs=(everywhere, everywhere, everywhere, specs),
        out_specs=specs[: len(like)],
        check_vma=False,  # a leaf that is everywhere is computed everywhere
    )(vector, count, numbers, [_laid(x, mesh, s) for x, s in zip(arrays, specs, strict=True)])
    homes = [None] * len(kept) + [shards.home] * (len(like) - len(kept))
    return [_brought(x, was, home, mesh) for x, was, home in zip(results, like, homes, strict=True)]


def _first_number(strides: Sequence[int], shard: jax.Array, axes: Axes) -> jax.Array:
    """The number that a shard's first element has in the whole leaf."""
    first = jnp.zeros((), jnp.uint32)
    for stride, length, names in zip(strides, shard.shape, axes, strict=True):
        if names:
            place = jax.lax.axis_index(names).astype(jnp.uint32)
            first += place * jnp.uint32(stride * length % 2**32)
    return first


def _laid(x: jax.Array, mesh: Any, spec: PartitionSpec) -> jax.Array:
    """The array as its shards are to come: where axes are explicit, XLA may not see to it."""
    mine = _sharding_in_type(x)
    if not _is_explicit(mesh) or mine.mesh.empty:
        return x
    return jax.sharding.reshard(x, NamedSharding(mine.mesh, spec))


def _brought(x: jax.Array, like: jax.Array, home: Axes | None, mesh: Any) -> jax.Array:
    """A result, brought where it belongs."""
    theirs = _sharding_in_type(like)
    if _is_explicit(mesh):
        return x if theirs.mesh.empty else jax.sharding.reshard(x, theirs)
    if home is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec_of(home)))


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)
