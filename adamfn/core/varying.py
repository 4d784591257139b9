"""Types of arrays that a loop or a mesh asks to be kept: dtype, weak type, and varying axes.

Inside `jax.shard_map` an array's type says over which axes of the mesh its value may vary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def axes_of(x: Any) -> frozenset[Any]:
    """The mesh axes over which an array may vary; none outside `jax.shard_map`."""
    kind: Any = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma  # vma: jax 0.8


def vary_together(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, each varying over every axis that one of them varies over."""
    every = frozenset[Any]().union(*map(axes_of, arrays))
    return [_vary(x, every) for x in arrays]


def with_type_of(new: Any, old: Any) -> jax.Array:
    """A scalar of the next state, with the type that it had in the last; a copy of the caller's."""
    return _vary(jnp.array(new, jnp.result_type(old)), axes_of(old))


def shape_like(x: jax.Array, dtype: Any) -> jax.ShapeDtypeStruct:
    """The type of a result that has the array's shape and varies as it does."""
    kind: Any = jax.typeof(x)
    manual = {"manual_axis_type": kind.mat} if hasattr(kind, "mat") else {"vma": kind.vma}
    return jax.ShapeDtypeStruct(x.shape, dtype, **manual)


def _vary(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    missing = tuple(axes - axes_of(x))
    lax: Any = jax.lax  # 0.8.0 has no pcast yet
    if not missing:
        return x
    return lax.pcast(x, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(x, missing)
