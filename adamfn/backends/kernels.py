"""Which kernels run the programs of leaves: by Mosaic on TPU, by Triton, Mosaic or XLA on GPU."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax

from adamfn.backends import passes
from adamfn.backends.gpu.device import capability
from adamfn.backends.tile import common_block
from adamfn.backends.tpu import kernel as mosaic
from adamfn.core.program import Call

Kernels = tuple[Any, ...]
"""Modules with a kernel, in the order in which they are asked."""


def kernels_on(platform: str, backend: str = "auto", context: Any = None) -> Kernels:
    """The kernels that a platform's device has.

    Args:
      platform: `"cpu"`, where they are interpreted, `"cuda"`, `"rocm"` or `"tpu"`.
      backend: `"mosaic_gpu"` for Mosaic before Triton.
      context: as for `capability`.
    """
    if platform == "tpu":
        return (mosaic,)
    found = capability(context) if platform == "cuda" else None
    by_triton, by_mosaic = list[Any](), list[Any]()
    # XLA refuses Triton before 8.0, and JAX will drop it.
    if (found is None or found >= 8) and find_spec("jax.experimental.pallas.triton"):
        from adamfn.backends.gpu import triton

        by_triton.append(triton)
    # Where Mosaic's instructions are missing, LLVM ends the process.
    if platform == "cpu" or (found is not None and found >= 9):
        from adamfn.backends.gpu import mosaic as mosaic_gpu

        by_mosaic += [mosaic_gpu] * (platform == "cpu" or mosaic_gpu.is_known())
    by_xla = [passes] if platform != "cpu" else []
    if backend == "mosaic_gpu":
        return (*by_mosaic, *by_triton, *by_xla)
    return (*([mosaic] if platform == "cpu" else []), *by_triton, *by_mosaic, *by_xla)


def kernel_for(
    kernels: Kernels, call: Call, avals: Sequence[Any], platform: str, *, asked: bool
) -> Callable[..., list[jax.Array]] | None:
    """The first of some kernels that replaces `run_call` for a call; None if XLA is to run it.

    If none is asked for, there is one for formats with blocks only: XLA makes one kernel of an
    elementwise program by itself.
    """
    block = common_block(call, avals)
    if block is None or not (block or asked):
        return None
    for kernel in kernels:
        lowers = platform != "tpu" or mosaic.can_lower(call, avals)
        if lowers and kernel.can_run(call, avals):
            return partial(kernel.run_leaf, call, platform=platform)
    return None
