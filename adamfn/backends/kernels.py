"""Which Pallas kernel runs a leaf's program: Mosaic's on TPU, Triton's on GPU.

`means` is none, but serves on GPU where a kernel would move more.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax

from adamfn.backends import means
from adamfn.backends.tile import common_block
from adamfn.backends.tpu import kernel as mosaic
from adamfn.core.program import Call

_by_triton: tuple[Any, ...] = ()
if find_spec("jax.experimental.pallas.triton"):  # which JAX will drop: XLA then runs what it ran
    from adamfn.backends import gpu as triton

    _by_triton = (triton,)

_KERNELS: dict[str, tuple[Any, ...]] = {
    "cuda": (*_by_triton, means),
    "rocm": (*_by_triton, means),
    "tpu": (mosaic,),
    "cpu": (mosaic, *_by_triton),  # interpreted
}


def kernel_for(
    call: Call, avals: Sequence[Any], platform: str, *, asked: bool
) -> Callable[..., list[jax.Array]] | None:
    """The kernel for a call on a platform, as `run_call` of it; None if XLA is to run it.

    Unasked, there is one for formats that store by blocks alone: of what needs no block XLA makes
    one kernel by itself.
    """
    block = common_block(call, avals)
    if block is None or not (block or asked):
        return None
    for kernel in _KERNELS[platform]:
        lowers = platform != "tpu" or mosaic.can_lower(call, avals)
        if lowers and kernel.can_run(call, avals):
            return partial(kernel.run_leaf, call, platform=platform)
    return None
