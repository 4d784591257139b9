"""Walking pytrees leaf by leaf, and saying which leaf is wrong when one is."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

PyTree: TypeAlias = Any
"""Any nest of containers that JAX knows, with arrays at its leaves."""

_T = TypeVar("_T", bound=type[Any])


def exported(state: _T) -> _T:
    """Decorates a named tuple in a state, so that `jax.export` can serialize it."""
    export.register_namedtuple_serialization(state, serialized_name=f"adamfn.{state.__name__}")
    return state


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


def matching_leaves(
    name: str,
    tree: PyTree,
    other_name: str,
    other: PyTree,
    way_out: str,
    fits: Callable[[Any, Any], bool] | None = None,
) -> list[Any]:
    """The leaves of a tree that must match another.

    Args:
      name: what error messages call the tree to match; its leaves have been checked.
      tree: the tree to match.
      other_name: what they call the tree that is checked.
      other: the tree that is checked.
      way_out: the end of the message: what to do when the two differ.
      fits: whether a leaf of each go together; None for equal shapes and both or neither complex.

    Raises:
      ValueError: they differ in structure, or two leaves do not go together.
      TypeError: a leaf of `other` is not an array, or not of floating point.
    """
    fits = fits or _is_like
    leaves, treedef = jax.tree.flatten(tree)
    others, other_treedef = jax.tree.flatten(other)
    if treedef == other_treedef:
        check_inexact(other, f"{name.split(':')[0]}: {other_name}")
    if treedef != other_treedef or not all(map(fits, leaves, others)):
        raise_mismatch(name, tree, other_name, other, fits, way_out)
    return others


def as_array(leaf: Any) -> Any:
    """A leaf as JAX has it: a number or an array of NumPy's as an array of JAX's."""
    return (
        jnp.asarray(leaf) if isinstance(leaf, np.ndarray | np.generic | float | complex) else leaf
    )


def has_shape_of(a: Any, b: Any) -> bool:
    """Whether two leaves have one shape."""
    return getattr(a, "shape", ()) == getattr(b, "shape", ())  # a Python number has none


def _is_like(a: Any, b: Any) -> bool:
    # A complex number would lose its imaginary part on its way into a real leaf.
    return has_shape_of(a, b) and jnp.iscomplexobj(a) == jnp.iscomplexobj(b)


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
    name = type(leaf).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


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
    if hasattr(leaf, "detach"):
        raise TypeError(
            f"{name}: the leaf at {path} is a tensor of torch's; expected an array of JAX's or"
            " NumPy's. Pass .detach().cpu().numpy() of it (.float() before, if it is bfloat16)."
        )
    raise TypeError(
        f"{name}: the leaf at {path} is {describe(leaf)}; expected an array of floating-point or"
        " complex numbers. Leave out what is not trained (optax.masked;"
        " eqx.filter(model, eqx.is_inexact_array); nnx.state(model, nnx.Param)), or convert it with"
        " .astype(jnp.float32)."
    )


def raise_mismatch(
    name: str,
    tree: PyTree,
    other_name: str,
    other: PyTree,
    fits: Callable[[Any, Any], bool],
    way_out: str,
) -> NoReturn:
    """Raises the error of `matching_leaves`, which names the first leaf that differs."""
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
