"""What a stage needs to know of all gradients at once: measured before the programs of leaves."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.core.bundle import Bundle
from adamfn.core.stage import Stage
from adamfn.trees import wide_dtype


def measured(
    stages: Sequence[Stage], grads: Sequence[Any], extra: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The extra arguments of a step, with what stages measure of the gradients among them.

    Args:
      stages: the joined stages.
      grads: the gradient of every leaf, as the first of the stages was given it.
      extra: the extra arguments, which win.
    """
    wanted = {name: measure for stage in stages for name, measure in stage.measures.items()}
    missing = {name: m for name, m in wanted.items() if extra.get(name) is None}
    if not missing:
        return extra
    arrays = [x for g in grads for x in (g if isinstance(g, Bundle) else [g])]
    return {**extra, **{name: measure(arrays) for name, measure in missing.items()}}


@jax.jit
def global_norm(grads: Sequence[jax.Array]) -> jax.Array:
    """The root of the sum of the squares of all elements, in float32 at least."""
    squares = [_square_sum(g) for g in grads]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def _square_sum(g: jax.Array) -> jax.Array:
    wide = wide_dtype(g.dtype)
    return jnp.sum(jnp.real(g.astype(wide) * jnp.conj(g.astype(wide))))
