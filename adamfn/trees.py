"""Walking pytrees leaf by leaf, and saying which leaf is wrong when one is."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

PyTree: TypeAlias = Any
"""Any nest of containers that JAX knows, with arrays at its leaves."""


def map_leaves(
    formula: Callable[..., tuple[jax.Array, ...]],
    trees: Mapping[str, PyTree],
    scalars: Sequence[PyTree] = (),
    *,
    caller: str,
    magnitudes: Sequence[str] = (),
    way_out: str,
) -> tuple[PyTree, ...]:
    """Applies `formula(*leaves, *scalars)` to each set of corresponding leaves.

    The formula is computed in float32 at least. Its k-th result takes the dtype of its k-th
    leaf, so `(g, mu, nu) -> (u, mu, nu)` gives every result the dtype of what it replaces.

    Leaves of one signature are handed to one jitted function, a few at a time. It is traced
    once and called again from then on, which is what makes tracing a thousand leaves cheap. Its
    cache is keyed by `formula`, so `formula` must be a function of a module and not a closure.

    Args:
      formula: a function of one leaf of each tree, then of the scalars; returns a tuple.
      trees: the trees by the names that error messages call them, the one to check first.
      scalars: numbers, scalar arrays or trees of them, the same for all leaves.
      caller: the function that error messages speak for.
      magnitudes: the names of the trees that are real even where the others are complex.
      way_out: the end of an error message: what to do when the trees do not match.

    Returns:
      One tree for each result, with the first tree's structure.

    Raises:
      ValueError: the trees differ in structure, in a leaf's shape, or in its being complex.
      TypeError: a leaf is not an array, or not of floating point.
    """
    leaves, treedef = _matching_leaves(trees, caller, magnitudes, way_out)
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(leaves):
        groups.setdefault(tuple(_signature(leaf) for leaf in row), []).append(index)
    results: list[tuple[jax.Array, ...]] = [()] * len(leaves)
    for indices in groups.values():
        for chosen in _batches(indices):
            rows = _map_rows(formula, [leaves[index] for index in chosen], tuple(scalars))
            for index, row in zip(chosen, rows, strict=True):
                results[index] = row
    if not results:  # an empty tree does not tell how many results there are
        return (next(iter(trees.values())),) * len(trees)
    return tuple(treedef.unflatten(column) for column in zip(*results, strict=True))


def _batches(indices: list[int]) -> list[list[int]]:
    # Tracing costs grow with the size of a batch and with their number. To trace a leaf costs as
    # much as six to ten calls, so sqrt(n) / 3 is near the best; and a power of two often divides n.
    # Odd leaves go one by one, lest the formula be traced again for an odd number of them.
    size = 1 << max(math.isqrt(len(indices)) // 3, 1).bit_length() - 1
    whole = len(indices) // size * size
    batches = [indices[start : start + size] for start in range(0, whole, size)]
    return batches + [[index] for index in indices[whole:]]


@partial(jax.jit, static_argnums=0)
def _map_rows(
    formula: Callable[..., tuple[jax.Array, ...]],
    rows: Sequence[Sequence[jax.Array]],
    scalars: Sequence[PyTree],
) -> list[tuple[jax.Array, ...]]:
    return [_apply_widened(formula, row, scalars) for row in rows]


def _apply_widened(
    formula: Callable[..., tuple[jax.Array, ...]],
    row: Sequence[jax.Array],
    scalars: Sequence[PyTree],
) -> tuple[jax.Array, ...]:
    wide = [jnp.asarray(leaf, wide_dtype(leaf.dtype)) for leaf in row]
    widest = max((real_dtype(leaf.dtype) for leaf in wide), key=lambda dtype: dtype.itemsize)
    scalars = jax.tree.map(partial(jnp.asarray, dtype=widest), scalars)
    results = formula(*wide, *scalars)
    return tuple(result.astype(leaf.dtype) for result, leaf in zip(results, row, strict=False))


def wide_dtype(dtype: Any) -> jnp.dtype[Any]:
    """The dtype that a leaf is computed and averaged in: its own, or float32 if that is wider."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def real_dtype(dtype: Any) -> jnp.dtype[Any]:
    """The dtype of the real part: float32 for complex64, and a real dtype's own self."""
    return jnp.finfo(dtype).dtype


def check_inexact(tree: PyTree, name: str) -> None:
    """Checks that every leaf is an array of floating-point or complex numbers.

    Args:
      tree: the tree; `None` and empty containers are no leaves.
      name: what the error message calls the tree.

    Raises:
      TypeError: names the first leaf that is something else.
    """
    for leaf in jax.tree.leaves(tree):
        if not _is_inexact(leaf):
            _raise_not_inexact(tree, name)


def _signature(leaf: Any) -> tuple[Any, ...]:
    # Outside jit, the arrays of one call must lie on the same devices.
    sharding = None if isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
    return getattr(leaf, "shape", ()), getattr(leaf, "dtype", type(leaf)), sharding


def _matching_leaves(
    trees: Mapping[str, PyTree], caller: str, magnitudes: Sequence[str], way_out: str
) -> tuple[list[tuple[Any, ...]], Any]:
    (name, tree), *others = trees.items()
    check_inexact(tree, f"{caller}: {name}")
    leaves, treedef = jax.tree.flatten(tree)
    columns = [leaves]
    for other_name, other in others:
        other_leaves, other_treedef = jax.tree.flatten(other)
        fits = _has_shape_of if other_name in magnitudes else _is_like
        if treedef == other_treedef:
            check_inexact(other, f"{caller}: {other_name}")
        if treedef != other_treedef or not all(map(fits, leaves, other_leaves)):
            _raise_mismatch(f"{caller}: {name}", tree, other_name, other, fits, way_out)
        columns.append(other_leaves)
    return list(zip(*columns, strict=True)), treedef


def _has_shape_of(a: Any, b: Any) -> bool:
    return getattr(a, "shape", ()) == getattr(b, "shape", ())  # a Python number has none


def _is_like(a: Any, b: Any) -> bool:
    # A complex number would lose its imaginary part on its way into a real leaf.
    return _has_shape_of(a, b) and jnp.iscomplexobj(a) == jnp.iscomplexobj(b)


def _is_inexact(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def describe(leaf: Any) -> str:
    """What an error message calls a leaf: `float32[3,4]`, `the Python int 3`, `a function`."""
    if leaf is None:
        return "nothing"
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    if isinstance(leaf, bool | int | float | complex):
        return f"the Python {type(leaf).__name__} {leaf}"
    return f"a {type(leaf).__name__}"


def _paths(tree: PyTree) -> dict[str, Any]:
    leaves = cast("list[tuple[Any, Any]]", jax.tree.leaves_with_path(tree))
    return {jax.tree_util.keystr(path) or "the root": leaf for path, leaf in leaves}


def _raise_not_inexact(tree: PyTree, name: str) -> NoReturn:
    path, leaf = next((p, x) for p, x in _paths(tree).items() if not _is_inexact(x))
    raise TypeError(
        f"{name}: the leaf at {path} is {describe(leaf)}; expected an array of floating-point or"
        " complex numbers. Leave out what is not trained (optax.masked;"
        " eqx.filter(model, eqx.is_inexact_array); nnx.state(model, nnx.Param)), or convert it with"
        " .astype(jnp.float32)."
    )


def _raise_mismatch(
    name: str,
    tree: PyTree,
    other_name: str,
    other: PyTree,
    fits: Callable[[Any, Any], bool],
    way_out: str,
) -> NoReturn:
    found, expected = _paths(tree), _paths(other)
    for path in {**expected, **found}:
        a, b = found.get(path), expected.get(path)
        if path not in found or path not in expected or not fits(a, b):
            raise ValueError(
                f"{name} and {other_name} differ at {path}: found {describe(a)}, expected"
                f" {describe(b)}. {way_out}"
            )
    raise ValueError(
        f"{name} and {other_name} have the same leaves in different containers: found"
        f" {jax.tree.structure(tree)}, expected {jax.tree.structure(other)}. {way_out}"
    )
