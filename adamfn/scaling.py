"""Multiplying every leaf by one factor: what `bias_correct` and `scale_by_lr` share."""

import chex
import jax

from adamfn.trees import PyTree, map_leaves


def scale_leaves(caller: str, updates: PyTree, factor: chex.Numeric) -> PyTree:
    """Returns `factor * updates`, each product rounded once, to its leaf's dtype.

    Args:
      caller: the transformation that asks, for error messages.
      updates: any pytree of floating-point or complex arrays.
      factor: a number or a scalar array.

    Raises:
      TypeError: a leaf is not an array of floating-point or complex numbers.
    """
    scaled, *_ = map_leaves(_scale, {"updates": updates}, (factor,), caller=caller, way_out="")
    return scaled


def _scale(u: jax.Array, factor: jax.Array) -> tuple[jax.Array]:
    return (u * factor,)
