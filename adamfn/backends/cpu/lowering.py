# SPDX-License-Identifier: Apache-2.0
"""Adam's program on CPU: native code, called through XLA's foreign function interface."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import mlir

from adamfn.backends.call import Call, Operands
from adamfn.backends.cpu import loader
from adamfn.core.formulas import (
    add_agreeing_multiple,
    add_multiple,
    atan2_ratio,
    multiply,
    ratio,
    unchanged,
)
from adamfn.core.program import Program
from adamfn.formats import Format
from adamfn.formats.blocks import size_for
from adamfn.formats.format import answer
from adamfn.formats.noise import runs_of

_UNREAD = 1000
"""The least number of operations for which XLA takes a thread of its own."""
_WORTH_A_THREAD = 2**15
"""The least number of elements whose step takes longer than another thread takes to begin."""
_MOMENTS = (ratio, atan2_ratio)


def scalar_places(program: Program) -> list[int] | None:
    """Where the scalars of Adam's formulas are in the program's vector, in the native code's order.

    Those are 1 - b1, 1 - b2, b1, b2, eps, eps_root, Nesterov's factor, the bias correction, the
    weight decay, minus the learning rate, the factor of clipping, the decay of what the update
    makes larger, whether the step is taken, and the two factors of an angle in place of a ratio; -1
    stands for one that the program lacks.

    Returns:
      The places, or None if the program is not of these formulas in this order.
    """
    places = jax.tree.unflatten(program.scalars, range(program.scalars.num_leaves))
    left = [
        (part, own)
        for part, own in zip(program.parts, places, strict=True)
        if part.formula is not unchanged
    ]

    def place_of(*formulas: Callable[..., Any]) -> int:
        """Where the scalar of a formula is, if it is the next."""
        found = bool(left) and left[0][0].formula in formulas
        return left.pop(0)[1][0] if found else -1

    taken = program.scalars.num_leaves if program.gated else -1
    clipping = place_of(multiply)
    if not left or left[0][0].formula not in _MOMENTS:
        return None
    part, (at, *own) = left.pop(0)
    ahead = a = b = None
    if part.formula is ratio:
        (ahead,) = own
        correction = place_of(multiply)
    else:
        correction, a, b = own
    shares = [at.b1.complement, at.b2.complement, at.b1.rate, at.b2.rate]
    of_moments = [*shares, at.eps, at.eps_root, ahead]
    cautious = bool(left) and left[0][0].formula is add_agreeing_multiple
    decay = place_of(add_multiple, add_agreeing_multiple)
    rest = [correction, decay, place_of(multiply), clipping, -1 if cautious else decay, taken, a, b]
    if left and program.weights is not None:
        left.pop()
    return None if left else [-1 if k is None else k for k in (*of_moments, *rest)]


def weight_bits(program: Program) -> int:
    """How many bits of a weight a program keeps; 0 of a weight as it is."""
    return 0 if program.weights is None else program.weights.bits


def format_of(program: Program) -> Format | None:
    """How a program of Adam's formulas stores moments."""
    return next((part.format for part in program.parts if part.formula in _MOMENTS), None)


def can_run(call: Call, operands: Operands) -> bool:
    """Whether a call can run in native code here, and gains by it."""
    # XLA adds an update with float32 moments to the parameters in the pass that computes it.
    format, bits = format_of(call.program), weight_bits(call.program)
    if call.program.is_last and not call.program.moves and format is None and not bits:
        return False
    leaves = [*operands.updates, *operands.params]
    return (
        answer(format, "native_code") is not None
        and call.program.update_dtype in (None, jnp.float32, leaves[0].dtype)
        and call.program.dtype == jnp.float32
        and all(aval.dtype in (jnp.float32, jnp.bfloat16) for aval in leaves)
        and scalar_places(call.program) is not None
        and loader.native().reason is None
    )


def _counted(scalars: jax.Array, count: jax.Array) -> jax.Array:
    """The scalars of a large step, and behind them the results of operations that nothing reads.

    XLA gives a program a thread only if it counts enough operations, and it counts none for native
    code.
    """
    counts = lax.broadcast(count.astype(scalars.dtype), (_UNREAD,))
    return lax.concatenate([scalars, counts + lax.iota(scalars.dtype, _UNREAD)], 0)


def lower(ctx: Any, *flat: Any, call: Call, tree: Any) -> Any:
    """The lowering rule: one call of native code, whose results replace its operands."""
    program, format = call.program, format_of(call.program)
    places: Operands = tree.unflatten(range(len(flat)))
    replaced: list[int] = jax.tree.leaves(call.replaced(places))
    aliases = {k: at for at, k in enumerate(replaced) if k not in places.updates}
    grads, block = tree.unflatten(ctx.avals_in).updates, answer(format, "block")
    sizes = [size_for(g.shape[-1], block) if block else 0 for g in grads]
    axes: list[int] = []
    for k, g in enumerate(grads):
        runs = runs_of(g.shape, call.strides_of(k, g.shape))
        axes += [len(runs), *(number for run in reversed(runs) for number in run)]
    scalars, in_avals = flat[0], list(ctx.avals_in)
    if sum(g.size for g in grads) >= _WORTH_A_THREAD:
        in_avals[0] = ShapedArray((in_avals[0].size + _UNREAD,), jnp.float32)
        counted = mlir.lower_fun(_counted, multiple_results=False)
        own = ctx.replace(avals_in=ctx.avals_in[:2], avals_out=in_avals[:1])
        (scalars,) = counted(own, *flat[:2])
    rule = jax.ffi.ffi_lowering(loader.TARGET, operand_output_aliases=aliases)
    return rule(
        ctx.replace(avals_in=in_avals),
        scalars,
        *flat[1:],
        format=np.int32(answer(format, "native_code")),
        bits=np.int32(weight_bits(program)),
        moves=program.moves,
        returns=program.update_dtype is not None,
        scalars=np.array(scalar_places(program), np.int64),
        blocks=np.array(sizes, np.int64),
        axes=np.array(axes, np.int64),
    )
