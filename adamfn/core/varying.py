"""Types of arrays that a loop or a mesh asks to be kept: dtype, weak type, and varying axes.

Inside `jax.shard_map` an array's type says over which axes of the mesh its value may vary.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

Axes = frozenset[Any]


def axes_of(x: Any) -> Axes:
    """The mesh axes over which an array may vary; none outside `jax.shard_map`."""
    kind = jax.typeof(x)
    manual = getattr(kind, "mat", None)  # jax 0.8 calls it vma
    return cast("Axes", getattr(kind, "vma", frozenset()) if manual is None else manual.varying)


def vary_together(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays, each varying over every axis that one of them varies over."""
    every: Axes = frozenset[Any]().union(*map(axes_of, arrays))
    return [_vary(x, every) for x in arrays] if every else list(arrays)


def with_type_of(new: Any, old: Any) -> jax.Array:
    """A scalar of the next state, with the type that it had in the last; a copy of the caller's."""
    return _vary(jnp.array(new, jnp.result_type(old)), axes_of(old))


def shape_like(
    x: jax.Array, dtype: Any, shape: tuple[int, ...] | None = None
) -> jax.ShapeDtypeStruct:
    """The type of a result that varies as the array does, of its shape if no other is given."""
    kind: Any = jax.typeof(x)
    manual: Any = {"vma": axes_of(x)}
    if hasattr(kind, "mat"):
        manual = {"manual_axis_type": kind.mat}
    return jax.ShapeDtypeStruct(x.shape if shape is None else shape, dtype, **manual)


def _vary(x: jax.Array, axes: Axes) -> jax.Array:
    missing = tuple(axes - axes_of(x))
    if not missing:
        return x
    pvary = getattr(jax.lax, "pvary", None)
    if pvary is not None:
        return cast("jax.Array", pvary(x, missing))
    return jax.lax.pcast(x, missing, to="varying")
