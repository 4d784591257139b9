"""Which Pallas kernel runs the program of a leaf: by Mosaic on TPU, by Triton on GPU."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax

from adamfn.backends.tile import common_block
from adamfn.backends.tpu import kernel as mosaic
from adamfn.core.program import Call

_by_triton: tuple[Any, ...] = ()
if find_spec("jax.experimental.pallas.triton"):  # which JAX will drop
    from adamfn.backends import gpu as triton

    _by_triton = (triton,)

_KERNELS: dict[str, tuple[Any, ...]] = {
    "cuda": _by_triton,
    "rocm": _by_triton,
    "tpu": (mosaic,),
    "cpu": (mosaic, *_by_triton),  # interpreted
}


def kernel_for(
    call: Call, avals: Sequence[Any], platform: str, *, asked: bool
) -> Callable[..., list[jax.Array]] | None:
    """A kernel that replaces `run_call` for a call on a platform; None if XLA is to run it.

    If it is not asked for, there is one for formats with blocks only: XLA makes one kernel of an
    elementwise program by itself.
    """
    block = common_block(call, avals)
    if block is None or not (block or asked):
        return None
    for kernel in _KERNELS[platform]:
        lowers = platform != "tpu" or mosaic.can_lower(call, avals)
        if lowers and kernel.can_run(call, avals):
            return partial(kernel.run_leaf, call, platform=platform)
    return None
