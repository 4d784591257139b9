# SPDX-License-Identifier: Apache-2.0
"""Leaves that are split over a mesh: each shard takes its step by itself, inside `jax.shard_map`.

So native code and kernels, which XLA cannot partition, run on the shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from adamfn.backends.call import Call, Operands, Results
from adamfn.backends.primitive import Backend, bind_primitive
from adamfn.core.leaf import Leaf
from adamfn.core.placement import (
    Axes,
    Path,
    Shards,
    axes_beside,
    axes_of_spec,
    size,
    spec_of,
    split_like,
)
from adamfn.formats.blocks import cut_block
from adamfn.formats.format import answer
from adamfn.formats.noise import strides_of
from adamfn.trees import described


def split_of(leaf: Leaf, given: Mapping[Path, Shards] | None) -> Shards | None:
    """How a leaf is split for its fused programs, if each shard can run them by itself.

    Args:
      leaf: the leaf.
      given: how leaves are split, by path; None to take it from the arrays' types, which say it
        if the axes of a mesh are explicit.

    Returns:
      None if a format of the leaf does not say how it is cut, or the mesh has axes of several
      types: XLA then partitions the step.

    Raises:
      ValueError: a shard would have a part of a block; names the leaf.
    """
    shards = _by_type(leaf) if given is None else given.get(leaf.path)
    return shards if shards and _can_split(leaf, shards, asked=given is not None) else None


def _can_split(leaf: Leaf, shards: Shards, *, asked: bool) -> bool:
    if len(set(shards.mesh.axis_types)) > 1:
        return False
    last = size(shards.axes[-1], shards.mesh) if shards.axes else 1
    shape = leaf.grad.shape
    for format, active in zip(leaf.formats, leaf.active, strict=True):
        block = answer(format, "block") if active else 0
        if block is None:
            return False
        cut = cut_block(block, shape, last)
        if cut is not None and not asked and shape[-1] <= cut:
            return False  # JAX can reshape what is split within the one block of a row
        if cut is not None:
            raise ValueError(
                f"The leaf at {leaf.name} is {described(leaf.grad)}, and its moments are split as"
                f" {spec_of(shards.axes)}: a device has {shape[-1] / last:g} elements of its last"
                f" axis, which cuts blocks of {cut}. Choose blocks that fit, with"
                " moments=adamfn.sharding.whole_blocks(moments, params, shardings, zero_axis), or"
                " split another axis."
            )
    return True


def _by_type(leaf: Leaf) -> Shards | None:
    """How a leaf is split that is on a mesh whose axes are all explicit."""
    g = leaf.grad
    if not _is_explicit(_sharding_in_type(g).mesh):
        return None
    arrays = [x for x in jax.tree.leaves((leaf.kept, leaf.param, g)) if jnp.shape(x) == g.shape]
    found = next(own for own in map(_sharding_in_type, arrays) if _is_explicit(own.mesh))
    home = axes_of_spec(_sharding_in_type(g).spec, g.ndim)
    return Shards(found.mesh, axes_of_spec(found.spec, g.ndim), home)


def _sharding_in_type(x: Any) -> Any:
    return jax.typeof(x).sharding


def run_on_shards(call: Call, backend: Backend, shards: Shards, operands: Operands) -> Results:
    """The results of a call whose leaves are split alike, each shard by itself."""
    mesh, axes = shards.mesh, shards.axes
    strides = tuple(strides_of(u.shape) for u in operands.updates)
    split = axes if any(axes) else ()
    parts = [
        part._replace(format=part.format and answer(part.format, "on_shards")(split))
        for part in call.program.parts
    ]
    program = replace(call.program, parts=tuple(parts))
    of_a_shard = Call(program, strides if split else None)

    def on_a_shard(operands: Operands) -> Results:
        firsts = [
            _first_index(of, x, axes) for of, x in zip(strides, operands.updates, strict=True)
        ]
        indices = jnp.stack([operands.indices[:, 0], jnp.stack(firsts)], axis=1)
        return bind_primitive(of_a_shard, backend, operands._replace(indices=indices))

    def spec(leaf: jax.Array, x: jax.Array) -> PartitionSpec:
        fits = x.ndim == leaf.ndim
        return spec_of(axes_beside(x.shape, leaf.shape, axes, mesh)) if fits else PartitionSpec()

    rows = zip(operands.updates, operands.kept, strict=True)
    kept = [jax.tree.map(partial(spec, u), row) for u, row in rows]
    everywhere: Any = PartitionSpec()
    whole: Any = [spec_of(axes)] * len(strides)
    params = whole[: len(operands.params)]
    specs = Operands(everywhere, everywhere, everywhere, kept, whole, params)
    laid = jax.tree.map(partial(_laid, mesh), operands[3:], specs[3:])
    results = jax.shard_map(
        on_a_shard,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=call.replaced(specs),
        check_vma=False,  # a leaf that is everywhere is computed everywhere
    )(Operands(*operands[:3], *laid))
    home = NamedSharding(mesh, spec_of(shards.home))
    if not _is_explicit(mesh):
        fixed = partial(jax.lax.with_sharding_constraint, shardings=home)
        return Results(results.kept, *(list(map(fixed, xs)) for xs in results[1:]))
    like = call.replaced(operands)
    return Results(
        jax.tree.map(split_like, results.kept, like.kept),
        [_laid(mesh, x, home.spec) for x in results.updates],
        list(map(split_like, results.params, like.params)),
    )


def _first_index(strides: Sequence[int], shard: jax.Array, axes: Axes) -> jax.Array:
    """The index of a shard's first element in the whole leaf."""
    first = jnp.zeros((), jnp.uint32)
    for stride, length, names in zip(strides, shard.shape, axes, strict=True):
        if names:
            place = jax.lax.axis_index(names).astype(jnp.uint32)
            first += place * jnp.uint32(stride * length % 2**32)
    return first


def _laid(mesh: Any, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """The array, split as its shards need it: with explicit axes, XLA may not do it."""
    mine = _sharding_in_type(x)
    if not _is_explicit(mesh) or mine.mesh.empty:
        return x
    return jax.sharding.reshard(x, NamedSharding(mine.mesh, spec))


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types)
