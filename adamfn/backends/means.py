"""The means of nu that a format keeps instead of nu itself, in passes of their own.

They are of more than a kernel's tile, so XLA computes them. On GPU it would join two passes that
read the same array, and write to memory what both compute.
"""

from collections.abc import Sequence
from typing import Any

import jax

from adamfn.backends.tile import factor_places
from adamfn.backends.xla import run_call
from adamfn.core.program import Call


def with_means(
    call: Call, operands: Sequence[jax.Array], others: Sequence[jax.Array]
) -> list[jax.Array]:
    """The results of a call, of its operands and its results but for means of nu."""
    results, apart, gradient = list(others), list(operands), 3 + call.arrays_kept
    for place in sorted(factor_places(call)):
        # One more barrier each time: no two passes have an operation in common.
        apart[gradient] = jax.lax.optimization_barrier(apart[gradient])
        results.insert(place, run_call(call, *apart)[place])  # computes no more than this
    return results


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether a call keeps such means."""
    return bool(factor_places(call)) and call.program.measures is None


def run_leaf(call: Call, *operands: jax.Array, platform: str) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`: by XLA alone, in few passes on GPU."""
    places = factor_places(call)
    whole = run_call(call, *operands)
    return with_means(call, operands, [x for k, x in enumerate(whole) if k not in places])
