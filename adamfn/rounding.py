"""Adding updates to bfloat16 parameters so that the sum is right on average."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats import Rounded, noise
from adamfn.trees import PyTree, check_inexact, describe, matching_leaves, path_name

_FIRST_LEAF = 2**31
"""Leaves are numbered from here, so that no noise is that of the moments."""


def add_stochastically(params: PyTree, updates: PyTree, count: Any, way_out: str) -> PyTree:
    """`params + updates`, where bfloat16 sums are rounded stochastically.

    Args:
      params: any pytree of floating-point or complex arrays.
      updates: a tree of the same structure and shapes.
      count: the step, an integer or an integer scalar.
      way_out: the end of an error message when the trees do not match.

    Raises:
      ValueError: structure or shapes differ, or the count is none.
      TypeError: a leaf is float16, or not an array of floating-point or complex numbers.
    """
    check_inexact(params, "apply_updates: params")
    name = "apply_updates: params"
    added = matching_leaves(name, params, "updates", updates, way_out)
    leaves, treedef = jax.tree.flatten(params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if jnp.result_type(leaf) == jnp.float16:
            raise TypeError(
                f"apply_updates: params: the leaf at {path_name(path) or 'the root'} is"
                f" {describe(leaf)}; expected bfloat16, or float32 and wider, which need no"
                " rounding. Use rounding='nearest', or convert it with .astype(jnp.bfloat16)."
            )
    whole = isinstance(count, int) or (
        hasattr(count, "dtype") and jnp.issubdtype(count.dtype, jnp.integer)
    )
    if not whole or jnp.ndim(count) != 0:
        raise ValueError(
            f"apply_updates: count is {count!r}; expected the step, an integer scalar, for"
            " rounding='stochastic'. A state knows it: state[0].count."
        )
    count = np.uint32(count % 2**32) if isinstance(count, int) else count
    numbers = [np.uint32(_FIRST_LEAF + index) for index in range(len(leaves))]
    rows = zip(numbers, leaves, added, strict=True)
    return treedef.unflatten([_add(number, p, u, count) for number, p, u in rows])


@jax.jit
def _add(number: jax.Array, param: jax.Array, update: jax.Array, count: jax.Array) -> jax.Array:
    total = wide_sum(param, update)
    if param.dtype != jnp.bfloat16:
        return total.astype(param.dtype)
    bits = (noise(count, number, total.shape) & 0xFFFF).astype(jnp.int32)
    return cast("jax.Array", Rounded().encode(total, bits).codes)


def wide_sum(param: jax.Array, update: jax.Array) -> jax.Array:
    """The sum in float32, or in the wider of the two dtypes."""
    wide = jnp.promote_types(jnp.promote_types(param.dtype, update.dtype), jnp.float32)
    return param.astype(wide) + update.astype(wide)
