"""The step of a group as a primitive of JAX, which each platform lowers in its own way."""

from functools import partial
from typing import Any, cast

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adamfn.fused import cpu
from adamfn.fused.reference import Group, step_group


def group_step(group: Group, *operands: jax.Array) -> list[jax.Array]:
    """`step_group`, on CPU in native code where it can be had.

    Under `vmap` and `jvp` it is the reference, and so it is where XLA is to partition it over the
    devices of a mesh: its operations are partitioned without a copy, native code could not be.
    Inside `jax.shard_map` every shard is whole, and native.
    """
    return cast("list[jax.Array]", _step_p.bind(*operands, group=group))


_step_p = Primitive("adamfn_step")
_step_p.multiple_results = True


def _impl(*operands: Any, group: Group) -> list[jax.Array]:
    return step_group(group, *operands)


def _abstract_eval(*avals: Any, group: Group) -> list[Any]:
    first = 3 + group.moments
    return [*avals[3:first], *avals[first + len(group.decays) :]]


def _batch(operands: Any, axes: Any, *, group: Group) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(partial(step_group, group), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, *, group: Group) -> Any:
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(partial(step_group, group), primals, tangents)


def _lower_for_cpu(ctx: Any, *operands: Any, group: Group) -> Any:
    if _is_whole(ctx.module_context.axis_context) and cpu.can_run(group, ctx.avals_in):
        return cpu.lower(ctx, *operands, group=group)
    return _lower(ctx, *operands, group=group)


def _is_whole(axis_context: Any) -> bool:
    """Whether the operands of what is lowered are whole arrays of one device."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return axis_context.manual_axes == frozenset(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) == 1


_lower = mlir.lower_fun(_impl, multiple_results=True)
_step_p.def_impl(_impl)
_step_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[_step_p] = _batch
ad.primitive_jvps[_step_p] = _jvp
mlir.register_lowering(_step_p, _lower)
mlir.register_lowering(_step_p, _lower_for_cpu, platform="cpu")
