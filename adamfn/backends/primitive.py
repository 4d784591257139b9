# SPDX-License-Identifier: Apache-2.0
"""A call of programs as a primitive of JAX, which each platform lowers in its own way."""

import threading
import warnings
from functools import partial
from typing import Any, Literal, get_args

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from adamfn.backends.call import Call, Operands, Results, by_leaf
from adamfn.backends.cpu import lowering
from adamfn.backends.xla import run_call
from adamfn.core.placement import vary_together

Backend = Literal["auto", "xla", "pallas", "mosaic_gpu"]
"""What runs a program: the fastest known where it is lowered, plain XLA, or Pallas kernels, on GPU
those by Mosaic first."""

BACKENDS: tuple[Backend, ...] = get_args(Backend)


def bind_primitive(call: Call, backend: Backend, operands: Operands) -> Results:
    """The results of a call.

    With `"auto"` it is lowered for CPU to native code if there is any, and for GPU and TPU to a
    kernel if the moments' format needs one; with `"pallas"` or `"mosaic_gpu"` to a kernel wherever
    there is one, interpreted on CPU. Otherwise it is `run_call`: under `vmap` and `jvp`; in a
    program exported for CPU or GPU; and where XLA is to partition it over the devices of a mesh,
    since XLA partitions its own operations without a copy and cannot partition a custom call.
    Inside `jax.shard_map` every shard is whole.

    Results vary over every mesh axis that an operand varies over.
    """
    flat, tree = jax.tree.flatten(operands)
    flat = vary_together(flat)
    if backend == "xla":
        return run_call(call, tree.unflatten(flat))
    results = _call_p.bind(*flat, call=call, tree=tree, backend=backend)
    return jax.tree.unflatten(jax.tree.structure(call.replaced(operands)), results)


_call_p = Primitive("adamfn_call")
_call_p.multiple_results = True


def _run(*flat: Any, call: Call, tree: Any, **_: Any) -> list[jax.Array]:
    return jax.tree.leaves(run_call(call, tree.unflatten(flat)))


def _abstract_eval(*avals: Any, call: Call, tree: Any, **_: Any) -> list[Any]:
    results: Any = call.replaced(tree.unflatten(avals))
    dtype = call.program.update_dtype
    updates = [u.update(dtype=dtype, weak_type=False) for u in results.updates]
    return jax.tree.leaves(results._replace(updates=updates))


def _batch(flat: Any, axes: Any, **params: Any) -> tuple[list[jax.Array], list[int]]:
    results = jax.vmap(partial(_run, **params), in_axes=tuple(axes))(*flat)
    return results, [0] * len(results)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    return jax.jvp(partial(_run, **params), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _lower_for(platform: str, ctx: Any, *flat: Any, call: Call, tree: Any, backend: Backend) -> Any:
    module = ctx.module_context
    own = {"call": call, "tree": tree}
    # Of what a serialized program may hold, only TPU's kernels stay what they are.
    exported = module.lowering_parameters.for_export and platform != "tpu"
    if exported or not _is_whole(module.axis_context):
        return _lower(ctx, *flat, **own)
    if platform == "cpu" and backend == "auto":
        can_run = lowering.can_run(call, tree.unflatten(ctx.avals_in))
        return (lowering.lower if can_run else _lower)(ctx, *flat, **own)
    from adamfn.backends.kernels import kernels_on  # slow to import

    kernels = kernels_on(platform, backend, module.axis_context)
    while True:
        run = partial(_run_by_kernels, kernels, platform, backend != "auto", call, tree)
        try:
            return _lower_quietly(run, platform, ctx, *flat)
        except Exception as error:
            # A kernel may not take a formula of a user, or a compiler not know an operation or GPU.
            surfaces = call.program.known and (platform == "tpu" or not _is_unknown(error))
            if surfaces or not kernels:
                raise
            kernels = kernels[1:]


_lock = threading.RLock()


def _lower_quietly(run: Any, platform: str, ctx: Any, *flat: Any) -> Any:
    """Lowers without the warning that Pallas' Triton is deprecated, which users cannot act on."""
    lower = mlir.lower_fun(run, multiple_results=True)
    if platform not in ("cuda", "rocm"):
        return lower(ctx, *flat)
    with _lock, warnings.catch_warnings():  # which threads must not enter at once
        warnings.filterwarnings("ignore", "The Pallas Triton", DeprecationWarning)
        return lower(ctx, *flat)


def _is_unknown(error: BaseException | None) -> bool:
    """Whether a compiler raised an error because it does not know an operation or the device."""
    # Pallas raises RuntimeError of an unknown device, and may wrap either in a LoweringError.
    unknown = isinstance(error, NotImplementedError) or type(error) is RuntimeError
    return error is not None and (unknown or _is_unknown(error.__cause__))


def _run_by_kernels(
    kernels: Any, platform: str, asked: bool, call: Call, tree: Any, *flat: jax.Array
) -> list[jax.Array]:
    from adamfn.backends.kernels import run_leaf

    operands: Operands = tree.unflatten(flat)
    if platform != "tpu" and len(operands.updates) > 1:
        # XLA for GPU makes one kernel of several leaves if they read the same array. Without the
        # barrier it would take the scalars out of the array again.
        scalars = jax.lax.optimization_barrier(operands.scalars)
        operands = operands._replace(scalars=scalars)
    return jax.tree.leaves(by_leaf(partial(run_leaf, kernels, platform, asked), call, operands))


def _is_whole(axis_context: Any) -> bool:
    """Whether the operands of what is lowered are whole arrays of one device."""
    if isinstance(axis_context, mlir.SPMDAxisContext):
        return axis_context.manual_axes == frozenset(axis_context.mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) == 1


_lower = mlir.lower_fun(_run, multiple_results=True)
_call_p.def_impl(_run)
_call_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[_call_p] = _batch
ad.primitive_jvps[_call_p] = _jvp
mlir.register_lowering(_call_p, _lower)
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_call_p, partial(_lower_for, _platform), platform=_platform)
