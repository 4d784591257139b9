"""The norm of all gradients, as the stages that look at it find it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.trees import wide_dtype


def grad_norm_in(extra: Mapping[str, Any]) -> jax.Array:
    """The norm of all gradients: the extra argument `grad_norm`, or else computed."""
    given = extra.get("grad_norm")
    return _global_norm(extra["grads"]) if given is None else jnp.asarray(given)


@jax.jit
def _global_norm(grads: Sequence[jax.Array]) -> jax.Array:
    squares = [_square_sum(g) for g in grads]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))


def _square_sum(g: jax.Array) -> jax.Array:
    wide = wide_dtype(g.dtype)
    return jnp.sum(jnp.real(g.astype(wide) * jnp.conj(g.astype(wide))))
