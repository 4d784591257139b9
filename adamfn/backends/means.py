"""The means of nu that a format keeps instead of nu itself, in passes of their own.

They are of more than a kernel's tile, so XLA computes them. Without a kernel for the rest it would
join the two on GPU, and write to memory what both compute.
"""

from collections.abc import Sequence
from typing import Any

import jax

from adamfn.backends.tile import factor_places
from adamfn.backends.xla import run_call
from adamfn.program import Call


def with_means(
    call: Call, operands: Sequence[jax.Array], others: Sequence[jax.Array]
) -> list[jax.Array]:
    """The results of a call, of its operands and its results but for means of nu."""
    results, gradient = list(others), 3 + call.arrays_kept
    if places := sorted(factor_places(call)):
        apart = list(operands)
        apart[gradient] = jax.lax.optimization_barrier(apart[gradient])
        whole = run_call(call, *apart)  # of which no more than the means is computed
        for place in places:
            results.insert(place, whole[place])
    return results


def can_run(call: Call, avals: Sequence[Any]) -> bool:
    """Whether a call keeps such means."""
    return bool(factor_places(call))


def run_leaf(call: Call, *operands: jax.Array, interpret: bool = False) -> list[jax.Array]:
    """`run_call` of a call that it `can_run`: by XLA alone, in few passes on GPU."""
    places = factor_places(call)
    whole = run_call(call, *operands)
    return with_means(call, operands, [x for k, x in enumerate(whole) if k not in places])
