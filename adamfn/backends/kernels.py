# SPDX-License-Identifier: Apache-2.0
"""Which kernels run the programs of leaves: by Mosaic on TPU, by Triton, Mosaic or XLA on GPU."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax

from adamfn.backends import chunks, passes
from adamfn.backends.call import Call, Operands, Results
from adamfn.backends.gpu.device import capability
from adamfn.backends.tile import LeafCall
from adamfn.backends.tpu import kernel as mosaic
from adamfn.backends.xla import run_call


def kernels_on(platform: str, backend: str = "auto", context: Any = None) -> list[Any]:
    """The modules with kernels for a platform's device, in the order in which they are asked.

    Args:
      platform: `"cpu"`, where they are interpreted, `"cuda"`, `"rocm"` or `"tpu"`.
      backend: `"mosaic_gpu"` for Mosaic before Triton.
      context: as for `capability`.
    """
    if platform == "tpu":
        return [mosaic]
    found = capability(context) if platform == "cuda" else None
    kernels: list[Any] = [mosaic] if platform == "cpu" and backend != "mosaic_gpu" else []
    # XLA refuses Triton before 8.0, and JAX will drop it.
    if (found is None or found >= 8) and find_spec("jax.experimental.pallas.triton"):
        from adamfn.backends.gpu import triton

        kernels.append(triton)
    # Where Mosaic's instructions are missing, LLVM ends the process.
    if platform == "cpu" or (found is not None and found >= 9):
        from adamfn.backends.gpu import mosaic as mosaic_gpu

        if platform == "cpu" or mosaic_gpu.fits_jax():
            kernels.insert(0 if backend == "mosaic_gpu" else len(kernels), mosaic_gpu)
    return kernels if platform == "cpu" else [*kernels, passes]


def run_leaf(
    kernels: Sequence[Any], platform: str, asked: bool, call: Call, operands: Operands
) -> Results:
    """`run_call` for a call of one leaf, by the first of some kernels that there is for it.

    If none is asked for, there is one for formats with blocks only: XLA makes one kernel of an
    elementwise program by itself. A large leaf without a kernel goes in chunks.
    """
    leaf = LeafCall(call, operands)
    wanted = leaf.block is not None if asked else leaf.block
    for kernel in (*(kernels if wanted else ()), chunks):
        results = kernel.run_leaf(leaf, platform)
        if results is not None:
            return jax.tree.unflatten(jax.tree.structure(call.replaced(operands)), results)
    return run_call(call, operands)
