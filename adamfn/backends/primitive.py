"""A call of programs as a primitive of JAX, which each platform lowers in its own way."""

import warnings
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adamfn.backends.cpu import lowering
from adamfn.backends.xla import by_leaf, run_call
from adamfn.core.placement import vary_together
from adamfn.core.program import Call

Backend = Literal["auto", "xla", "pallas", "mosaic_gpu"]
"""What runs a program: the fastest known where it is lowered, plain XLA, or Pallas kernels, on GPU
those by Mosaic first."""

BACKENDS: tuple[Backend, ...] = get_args(Backend)


def bind_primitive(call: Call, backend: Backend, operands: list[Any]) -> list[jax.Array]:
    """The results of a call.

    With `"auto"` it is lowered for CPU to native code if there is any, and for GPU and TPU to a
    kernel if the moments' format needs one; with `"pallas"` or `"mosaic_gpu"` to a kernel wherever
    there is one, interpreted on CPU. Otherwise it is `run_call`: under `vmap` and `jvp`; in a
    program exported for CPU or GPU; and where XLA is to partition it over the devices of a mesh,
    since XLA partitions its own operations without a copy and cannot partition a custom call.
    Inside `jax.shard_map` every shard is whole.

    Results vary over every mesh axis that an operand varies over.
    """
    operands = vary_together(operands)
    if backend == "xla":
        return run_call(call, *operands)
    results = _call_p.bind(*operands, call=call, backend=backend)
    return cast("list[jax.Array]", results)


_call_p = Primitive("adamfn_call")
_call_p.multiple_results = True


def _impl(*operands: Any, call: Call, backend: Backend = "auto") -> list[jax.Array]:
    return run_call(call, *operands)


def _abstract_eval(*avals: Any, call: Call, backend: Backend) -> list[Any]:
    kept, leaves = avals[3:][: call.arrays_kept], avals[3 + call.arrays_kept :]
    grads, params = leaves[: call.leaves], leaves[call.leaves :]
    dtype = call.program.update_dtype
    updates = [] if dtype is None else [g.update(dtype=dtype, weak_type=False) for g in grads]
    return [*kept, *updates, *(params if call.program.moves else ())]


def _batch(
    operands: Any, axes: Any, *, call: Call, backend: Backend
) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(partial(run_call, call), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, *, call: Call, backend: Backend) -> Any:
    tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
    return jax.jvp(partial(run_call, call), primals, tangents)


def _lower_for(platform: str, ctx: Any, *operands: Any, call: Call, backend: Backend) -> Any:
    module = ctx.module_context
    # Of what a serialized program may hold, only TPU's kernels stay what they are.
    exported = module.lowering_parameters.for_export and platform != "tpu"
    if exported or not _is_whole(module.axis_context):
        return _lower(ctx, *operands, call=call, backend=backend)
    if platform == "cpu" and backend == "auto":
        can_run = lowering.can_run(call, ctx.avals_in)
        return (lowering.lower if can_run else _lower)(ctx, *operands, call=call)
    from adamfn.backends.kernels import kernels_on  # slow to import

    kernels = kernels_on(platform, backend, module.axis_context)
    while True:
        run = partial(_run_by_kernels, kernels, platform, backend != "auto", call)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The Pallas Triton", DeprecationWarning)
                return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)
        except Exception:
            # A compiler for GPU may not know an operation of a user's stage, or the device.
            if platform not in ("cuda", "rocm") or not kernels:
                raise
            kernels = kernels[1:]


def _run_by_kernels(
    kernels: Any, platform: str, asked: bool, call: Call, *operands: jax.Array
) -> list[jax.Array]:
    """`run_call`, with a kernel for each leaf that has one, and other large leaves in chunks."""
    from adamfn.backends import chunks
    from adamfn.backends.kernels import kernel_for

    def run_one(call: Call, *operands: jax.Array) -> list[jax.Array]:
        kernel = kernel_for(kernels, call, operands, platform, asked=asked)
        if kernel is not None:
            return kernel(*operands)
        return (chunks.run_leaf if chunks.can_run(call, operands) else run_call)(call, *operands)

    if platform != "tpu" and call.leaves > 1:
        # XLA for GPU makes one kernel of several leaves if they read the same array. Without the
        # barrier it would take the scalars out of the array again.
        vector, *others = operands
        operands = jax.lax.optimization_barrier(vector), *others
    return by_leaf(run_one, call, *operands)


def _is_whole(axis_context: Any) -> bool:
    """Whether the operands of what is lowered are whole arrays of one device."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return axis_context.manual_axes == frozenset(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) == 1


_lower = mlir.lower_fun(_impl, multiple_results=True)
_call_p.def_impl(_impl)
_call_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[_call_p] = _batch
ad.primitive_jvps[_call_p] = _jvp
mlir.register_lowering(_call_p, _lower)
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_call_p, partial(_lower_for, _platform), platform=_platform)
