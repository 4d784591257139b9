"""The step of a group on CPU: native code, called through XLA's foreign function interface."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats import EightBit, Format, Pair, Rounded
from adamfn.formats.blocks import size_for
from adamfn.fused import native
from adamfn.fused.reference import Group

_TARGET = "adamfn_step"
_LARGEST_BLOCK = 1024
_FORMATS: dict[Format | None, int] = {
    None: 0,
    Pair(Rounded(), Rounded()): 1,
    Pair(Rounded(stochastic=False), Rounded(stochastic=False)): 2,
}
_EIGHT_BIT = 3


def knows(format: Format | None, *dtypes: Any) -> bool:
    """Whether native code has a format and the dtypes of a leaf and its gradient."""
    known = format in _FORMATS or (
        type(format) is EightBit and format.block <= _LARGEST_BLOCK  # a subclass may differ
    )
    return known and all(dtype in (jnp.float32, jnp.bfloat16) for dtype in dtypes)


def can_run(group: Group, avals: Any) -> bool:
    """Whether a group can run in native code here. Compiles it at the first call."""
    leaves = avals[3 + group.moments :]
    return knows(group.format, *(aval.dtype for aval in leaves)) and native.load() is None


def lower(ctx: Any, *operands: Any, group: Group) -> Any:
    """The lowering rule: one call, whose results lie where its operands do."""
    first, number = 3 + group.moments, len(group.decays)
    in_place = [*range(3, first), *range(first + number, len(operands))]
    aliases = {operand: result for result, operand in enumerate(in_place)}
    sizes = [0] * number
    if isinstance(group.format, EightBit):
        sizes = [size_for(p.shape[-1], group.format.block) for p in ctx.avals_in[first + number :]]
    rule = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=aliases)
    return rule(
        ctx,
        *operands,
        format=np.int32(_FORMATS.get(group.format, _EIGHT_BIT)),
        packed=group.packed,
        nesterov=group.nesterov,
        blocks=np.array(sizes, np.int64),
        decays=np.array(group.decays, np.int64),
    )
