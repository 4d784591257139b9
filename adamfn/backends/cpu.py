"""Adam's program on CPU: native code, called through XLA's foreign function interface."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.backends.native import loader
from adamfn.formats import EightBit, Format, Pair, Rounded
from adamfn.formats.blocks import size_for
from adamfn.formulas import add_multiple, multiply, ratio
from adamfn.program import Call, Program

_TARGET = "adamfn_step"
_LARGEST_BLOCK = 1024
_FORMATS: dict[Format | None, int] = {
    None: 0,
    Pair(Rounded(), Rounded()): 1,
    Pair(Rounded(stochastic=False), Rounded(stochastic=False)): 2,
}
_EIGHT_BIT = 3


def scalar_places(program: Program) -> list[int] | None:
    """Where the scalars of Adam's formulas lie in the program's vector, in the native code's order.

    Those are 1 - b1, 1 - b2, b1, b2, eps, eps_root, Nesterov's factor, the bias correction, the
    weight decay and minus the learning rate; -1 stands for one that the program lacks.

    Returns:
      The places, or None if the program is not of these formulas in this order.
    """
    numbers = jax.tree.unflatten(program.scalars, range(program.scalars.num_leaves))
    active = [(p, own) for p, own in zip(program.parts, numbers, strict=True) if p.active]
    if not active or active[0][0].formula is not ratio:
        return None
    b1, b2, eps, eps_root, ahead = active[0][1]
    of_ratio = [b1.complement, b2.complement, b1.rate, b2.rate, eps, eps_root, ahead]
    rest: list[int] = []
    wanted: list[Callable[..., Any]] = [multiply, add_multiple, multiply]
    following = active[1:]
    for formula in wanted:
        found = bool(following) and following[0][0].formula is formula
        rest.append(following.pop(0)[1][0] if found else -1)
    return None if following else [-1 if k is None else k for k in (*of_ratio, *rest)]


def knows_format(format: Format | None) -> bool:
    """Whether native code, and kernels, are written for a format."""
    # A subclass of EightBit may differ.
    return format in _FORMATS or (type(format) is EightBit and format.block <= _LARGEST_BLOCK)


def can_run(call: Call, avals: Any) -> bool:
    """Whether a call can run in native code here, and gains by it. Builds it at the first call."""
    # Of a float32 update alone XLA makes as few passes, with the parameters' sum in the last.
    if not call.program.moves and call.program.parts[0].format is None:
        return False
    leaves = avals[3 + call.arrays_kept :]
    return (
        knows_format(call.program.parts[0].format)
        and call.program.dtype == jnp.float32
        and all(aval.dtype in (jnp.float32, jnp.bfloat16) for aval in leaves)
        and scalar_places(call.program) is not None
        and loader.load().reason is None
    )


def lower(ctx: Any, *operands: Any, call: Call) -> Any:
    """The lowering rule: one call of native code, whose results lie where its operands do."""
    program, first, leaves = call.program, 3 + call.arrays_kept, call.leaves
    format = program.parts[0].format
    aliases = {3 + k: k for k in range(call.arrays_kept)}
    if program.moves:
        updates = 0 if program.update_dtype is None else leaves
        aliases |= {first + leaves + k: call.arrays_kept + updates + k for k in range(leaves)}
    sizes = [0] * leaves
    if isinstance(format, EightBit):
        grads = ctx.avals_in[first : first + leaves]
        sizes = [size_for(g.shape[-1], format.block) for g in grads]
    rule = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=aliases)
    return rule(
        ctx,
        *operands,
        format=np.int32(_FORMATS.get(format, _EIGHT_BIT)),
        packed=call.packed,
        moves=program.moves,
        returns=program.update_dtype is not None,
        scalars=np.array(scalar_places(program), np.int64),
        blocks=np.array(sizes, np.int64),
    )
