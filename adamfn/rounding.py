"""Adding updates to bfloat16 parameters so that the sum is right on average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats import Rounded, noise
from adamfn.trees import PyTree, Widened, describe, map_rows, matching_leaves, path_name

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
    trees = {"params": params, "updates": updates}
    rows, treedef = matching_leaves(trees, "apply_updates", (), way_out)
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
    numbered = [(np.uint32(_FIRST_LEAF + index), *row) for index, row in enumerate(rows)]
    return treedef.unflatten([total for (total,) in map_rows(_add, numbered, (count,))])


def _add(
    leaf: jax.Array, param: jax.Array, update: jax.Array, count: jax.Array
) -> tuple[jax.Array, ...]:
    if param.dtype != jnp.bfloat16:
        return Widened(lambda p, u: (p + u,), leaves=2)(param, update)
    total = param.astype(jnp.float32) + update.astype(jnp.float32)
    bits = (noise(count, leaf, total.shape) & 0xFFFF).astype(jnp.int32)
    return (Rounded().encode(total, bits),)
