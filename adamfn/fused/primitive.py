"""The step of a group as a primitive of JAX, which each platform lowers in its own way."""

from functools import partial
from typing import Any, cast

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adamfn.fused import cpu
from adamfn.fused.reference import Group, step_group


def group_step(group: Group, *operands: jax.Array) -> list[jax.Array]:
    """`step_group`, where it is lowered for CPU in native code if that can be had.

    Under `vmap` and `jvp` it is the reference, and so it is where XLA is to partition it over the
    devices of a mesh: its operations are partitioned without a copy, native code could not be.
    Inside `jax.shard_map` every shard is whole, and native.
    """
    return cast("list[jax.Array]", _step_p.bind(*operands, group=group, pallas=False))


def pallas_group_step(group: Group, *operands: jax.Array) -> list[jax.Array]:
    """`step_group`, by a Pallas kernel where there is one for the group; on CPU interpreted.

    The reference is taken as `group_step` takes it.
    """
    return cast("list[jax.Array]", _step_p.bind(*operands, group=group, pallas=True))


_step_p = Primitive("adamfn_step")
_step_p.multiple_results = True


def _impl(*operands: Any, group: Group, pallas: bool) -> list[jax.Array]:
    return step_group(group, *operands)


def _abstract_eval(*avals: Any, group: Group, pallas: bool) -> list[Any]:
    first = 3 + group.moments
    return [*avals[3:first], *avals[first + len(group.decays) :]]


def _batch(
    operands: Any, axes: Any, *, group: Group, pallas: bool
) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(partial(step_group, group), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, *, group: Group, pallas: bool) -> Any:
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(partial(step_group, group), primals, tangents)


def _lower_for(platform: str, ctx: Any, *operands: Any, group: Group, pallas: bool) -> Any:
    if _is_whole(ctx.module_context.axis_context):
        if pallas:
            from adamfn.fused import pallas as kernel  # slow to import

            if kernel.can_run(group, ctx.avals_in, platform):
                step = partial(kernel.step_leaf, group, platform, interpret=platform == "cpu")
                return mlir.lower_fun(step, multiple_results=True)(ctx, *operands)
        elif platform == "cpu" and cpu.can_run(group, ctx.avals_in):
            return cpu.lower(ctx, *operands, group=group)
    return _lower(ctx, *operands, group=group, pallas=pallas)


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
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_step_p, partial(_lower_for, _platform), platform=_platform)
