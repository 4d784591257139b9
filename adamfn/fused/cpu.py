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
    aliased = (
        range(3, 3 + group.moments),
        range(3 + group.moments + len(group.decays), len(operands)),
    )
    aliases = {operand: result for result, operand in enumerate([*aliased[0], *aliased[1]])}
    row = ctx.avals_in[-1].shape[-1:]
    size = size_for(row[0], group.format.block) if isinstance(group.format, EightBit) else 0
    rule = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=aliases)
    return rule(
        ctx,
        *operands,
        format=np.int32(_FORMATS.get(group.format, _EIGHT_BIT)),
        block=np.int32(size),
        nesterov=group.nesterov,
        decays=np.array(group.decays, np.int64),
    )
