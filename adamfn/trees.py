"""Walking pytrees leaf by leaf, and saying which leaf is wrong when one is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

    Args:
      formula: a function of one leaf of each tree, then of the scalars; returns a tuple. It must be
        a function of a module, not a closure: `map_rows` says why.
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
    leaves, treedef = matching_leaves(trees, caller, magnitudes, way_out)
    results = map_rows(Widened(formula, len(trees)), leaves, tuple(scalars))
    if not results:  # an empty tree does not tell how many results there are
        return (next(iter(trees.values())),) * len(trees)
    return tuple(treedef.unflatten(column) for column in zip(*results, strict=True))


def map_rows(
    function: Callable[..., tuple[PyTree, ...]], rows: Sequence[PyTree], shared: Sequence[PyTree]
) -> list[tuple[PyTree, ...]]:
    """Returns `function(*row, *shared)` for each row.

    Rows of one signature are handed to one jitted function, a few at a time. It is traced once and
    called again from then on, which is what makes tracing a thousand leaves cheap. Its cache is
    keyed by `function`, so that must be hashable and equal to itself from call to call: a function
    of a module or a frozen dataclass, not a closure.
    """
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        arrays, treedef = jax.tree.flatten(row)
        groups.setdefault((treedef, *map(_signature, arrays)), []).append(index)
    results: list[tuple[PyTree, ...]] = [()] * len(rows)
    for indices in groups.values():
        for chosen in _batches(indices):
            batch = _map_batch(function, [rows[index] for index in chosen], shared)
            for index, row in zip(chosen, batch, strict=True):
                results[index] = row
    return results


def _batches(indices: list[int]) -> list[list[int]]:
    # Tracing costs grow with the size of a batch and with their number. To trace a leaf costs as
    # much as six to ten calls, so sqrt(n) / 3 is near the best; and a power of two often divides n.
    # Odd leaves go one by one, lest the formula be traced again for an odd number of them.
    size = 1 << max(math.isqrt(len(indices)) // 3, 1).bit_length() - 1
    whole = len(indices) // size * size
    batches = [indices[start : start + size] for start in range(0, whole, size)]
    return batches + [[index] for index in indices[whole:]]


@partial(jax.jit, static_argnums=0)
def _map_batch(
    function: Callable[..., tuple[PyTree, ...]],
    rows: Sequence[Sequence[PyTree]],
    shared: Sequence[PyTree],
) -> list[tuple[PyTree, ...]]:
    return [function(*row, *shared) for row in rows]


@dataclass(frozen=True)
class Widened:
    """A formula of leaves and scalars, computed in float32 at least.

    Its k-th result takes the dtype of its k-th leaf. Scalars become arrays of the widest real
    dtype among the leaves.
    """

    formula: Callable[..., tuple[jax.Array, ...]]
    leaves: int
    """How many of the arguments are leaves."""

    def __call__(self, *arguments: PyTree) -> tuple[jax.Array, ...]:
        """Returns the formula's results."""
        row, scalars = arguments[: self.leaves], arguments[self.leaves :]
        wide = [jnp.asarray(leaf, wide_dtype(leaf.dtype)) for leaf in row]
        widest = max((real_dtype(leaf.dtype) for leaf in wide), key=lambda dtype: dtype.itemsize)
        scalars = jax.tree.map(partial(jnp.asarray, dtype=widest), scalars)
        results = self.formula(*wide, *scalars)
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


def matching_leaves(
    trees: Mapping[str, PyTree], caller: str, magnitudes: Sequence[str], way_out: str
) -> tuple[list[tuple[Any, ...]], Any]:
    """The corresponding leaves of trees that must match, and the first one's structure.

    Arguments and errors are those of `map_leaves`.
    """
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
    try:
        return bool(jnp.issubdtype(dtype, jnp.inexact))
    except TypeError:  # another library's
        return False


def path_name(path: Any) -> str:
    """A path as users write it: `layers/0/kernel`, without the `value` of a Flax variable."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(leaf: Any) -> str:
    """What an error message calls a leaf: `float32[3,4]`, `the Python int 3`, `a function`."""
    if leaf is None:
        return "nothing"
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    if isinstance(leaf, bool | int | float | complex):
        return f"the Python {type(leaf).__name__} {leaf}"
    return f"a {type(leaf).__name__}"


def _is_sparse(leaf: Any) -> bool:
    return any(base.__name__ == "JAXSparse" for base in type(leaf).__mro__)  # slow to import


def _paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    leaves = cast("list[tuple[Any, Any]]", jax.tree.leaves_with_path(tree, is_leaf=is_leaf))
    return {jax.tree_util.keystr(path) or "the root": leaf for path, leaf in leaves}


def _raise_not_inexact(tree: PyTree, name: str) -> NoReturn:
    for path, leaf in _paths(tree, _is_sparse).items():
        if _is_sparse(leaf):
            raise TypeError(
                f"{name}: the leaf at {path} is a sparse {type(leaf).__name__}; expected a dense"
                " array. Make it dense with .todense(); adamfn.lazy_adam finds its zero rows."
            )
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
