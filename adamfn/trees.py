# SPDX-License-Identifier: Apache-2.0
"""Walking pytrees leaf by leaf, and saying which leaf is wrong when one is."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

if TYPE_CHECKING:
    from chex import Numeric as Numeric
else:  # so that a user's import of adamfn does not wait for chex
    Numeric = jax.typing.ArrayLike

PyTree: TypeAlias = Any
"""Any nest of containers that JAX knows, with arrays at its leaves."""

_INCONCLUSIVE: Any = getattr(jax.errors, "InconclusiveDimensionOperation", Exception)  # jax 0.8

_T = TypeVar("_T", bound=type[Any])


def exported(state: _T) -> _T:
    """Decorates a named tuple in a state, so that `jax.export` can serialize it."""
    export.register_namedtuple_serialization(state, serialized_name=f"adamfn.{state.__name__}")
    return state


def wide_dtype(dtype: Any) -> jnp.dtype[Any]:
    """The dtype that a leaf is computed and averaged in: its dtype, but float32 at least."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def real_dtype(dtype: Any) -> jnp.dtype[Any]:
    """The dtype of the real part: float32 for complex64; a real dtype is unchanged."""
    return jnp.finfo(dtype).dtype


def widened(x: jax.Array, real: Any) -> jax.Array:
    """An array in a real dtype, or if it is complex in the complex dtype of that width."""
    complex_of = jnp.complex64 if real == jnp.float32 else jnp.complex128
    return x.astype(complex_of if jnp.iscomplexobj(x) else real)


def check_inexact(tree: PyTree, name: str) -> None:
    """Raises a TypeError that names the first leaf that is not of floating-point numbers."""
    if all(map(_is_inexact, jax.tree.leaves(tree))):
        return
    path, leaf = next(
        (path, x) for path, x in _paths(tree).items() if _is_sparse(x) or not _is_inexact(x)
    )
    at = f"{name}: the leaf at {path} is"
    if _is_sparse(leaf):
        raise TypeError(
            f"{at} a sparse {type(leaf).__name__}; expected a dense array. Make it dense with"
            " .todense(); adamfn.lazy_adam finds its zero rows."
        )
    if hasattr(leaf, "detach"):
        raise TypeError(
            f"{at} a tensor of torch's; expected an array of JAX's or NumPy's. Pass"
            " .detach().cpu().numpy() of it (.float() before, if it is bfloat16)."
        )
    raise TypeError(
        f"{at} {described(leaf)}; expected an array of floating-point or complex numbers. Leave out"
        " what is not trained (optax.masked; eqx.filter(model, eqx.is_inexact_array);"
        " nnx.state(model, nnx.Param)), or convert it with .astype(jnp.float32)."
    )


def matching_leaves(
    name: str, tree: PyTree, other_name: str, other: PyTree, way_out: str
) -> list[Any]:
    """The leaves of `other`, which must match a checked tree; `way_out` ends the message.

    Raises:
      ValueError: they differ in structure, or two leaves in shape or in being complex.
      TypeError: a leaf of `other` is not an array, or not of floating point.
    """
    leaves, treedef = jax.tree.flatten(tree)
    others, other_treedef = jax.tree.flatten(other)
    if treedef == other_treedef:
        check_inexact(other, f"{name.split(':')[0]}: {other_name}")
    if treedef != other_treedef or not all(map(_is_like, leaves, others)):
        raise_mismatch(name, tree, other_name, other, _is_like, way_out)
    return others


def check_swapped(call: str, state: PyTree, other: PyTree) -> None:
    """Raises a TypeError if a state is where something else should be, and the reverse.

    `call` says the right order, such as `update(updates, state, params)`.
    """
    if holds_state(other) and not holds_state(state):
        raise TypeError(
            f"{call}: found {described(state)} in place of the state; expected this order."
        )


def holds_state(tree: Any) -> bool:
    """Whether a tree is a state of ours, or a tuple with one."""
    ours = type(tree).__module__.startswith("adamfn.") and hasattr(tree, "_fields")
    return ours or (type(tree) is tuple and any(map(holds_state, cast("tuple[Any]", tree))))


def as_array(leaf: Any) -> Any:
    """A leaf as JAX has it: a number or an array of NumPy's as an array of JAX's."""
    foreign = isinstance(leaf, np.ndarray | np.generic | float | complex)
    return jnp.asarray(leaf) if foreign else leaf


def at_least(size: Any, bound: Any) -> bool:
    """Whether a size is known to be at least a bound: a symbolic one of `jax.export` may not be."""
    try:
        return bool(size >= bound)
    except _INCONCLUSIVE:
        return False


def is_known(size: Any) -> bool:
    """Whether a size is a number, and not a symbolic one of `jax.export`."""
    return isinstance(size, int)


def has_shape_of(a: Any, b: Any) -> bool:
    """Whether two leaves have one shape."""
    return getattr(a, "shape", ()) == getattr(b, "shape", ())  # a Python number has none


def _is_like(a: Any, b: Any) -> bool:
    # A complex number would lose its imaginary part on its way into a real leaf.
    return has_shape_of(a, b) and jnp.iscomplexobj(a) == jnp.iscomplexobj(b)


def _is_inexact(leaf: Any) -> bool:
    if getattr(leaf, "dtype", None) is None:
        return isinstance(leaf, float | complex)
    try:
        return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
    except TypeError:  # another library's
        return False


def path_name(path: Any) -> str:
    """A path as users write it: `layers/0/kernel`, without the `value` of a Flax variable."""
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def described(leaf: Any) -> str:
    """What an error message calls a leaf: `float32[3,4]`, `the Python int 3`, `a function`."""
    if leaf is None:
        return "nothing"
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    name = type(leaf).__name__
    if isinstance(leaf, bool | int | float | complex):
        return f"the Python {name} {leaf}"
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def shown(value: Any) -> str:
    """What an error message calls an argument: as it was written if that is short, else its kind.

    Arrays are never printed: that would fetch them, and fill the screen.
    """
    if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value)):
        return described(value)
    text = repr(value)
    return text if len(text) < 100 else described(value)


def structure_name(tree: PyTree) -> str:
    """The containers of a tree, as an error message has room for."""
    text = str(jax.tree.structure(tree))
    return text if len(text) < 300 else f"{text[:300]}..."


def check_values(caller: str, **trees: PyTree) -> None:
    """Checks that trees hold values.

    Raises:
      TypeError: a leaf has a shape alone; names it.
    """
    for name, tree in trees.items():
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
            leaves = _paths(tree).items()
            path = next(path for path, x in leaves if isinstance(x, jax.ShapeDtypeStruct))
            raise TypeError(
                f"{caller}: {name} has a shape without values at {path}; expected arrays. For the"
                f" shapes of the results, pass {caller} to jax.eval_shape."
            )


def _is_sparse(leaf: Any) -> bool:
    return any(base.__name__ == "JAXSparse" for base in type(leaf).__mro__)  # slow to import


def _paths(tree: PyTree) -> dict[str, Any]:
    leaves = cast("list[tuple[Any, Any]]", jax.tree.leaves_with_path(tree, is_leaf=_is_sparse))
    return {jax.tree_util.keystr(path) or "the root": leaf for path, leaf in leaves}


def raise_mismatch(
    name: str, tree: PyTree, other_name: str, other: PyTree, fits: Callable[..., bool], way_out: str
) -> NoReturn:
    """Raises the error of `matching_leaves`, which names the first leaf that differs."""
    found, expected = _paths(tree), _paths(other)
    alike = {path for path in found.keys() & expected if fits(found[path], expected[path])}
    path = next((path for path in {**expected, **found} if path not in alike), None)
    if path is None:
        differ = "have the same leaves in different containers"
        a, b = structure_name(tree), structure_name(other)
    elif found.keys() == expected.keys() or type(tree) is type(other) or None in (tree, other):
        a, b = (described(leaves.get(path)) for leaves in (found, expected))
        differ = f"differ at {path}"
    else:
        differ, a, b = "differ at the root", described(tree), described(other)
        if type(tree) is tuple and jax.tree.structure(other) in map(jax.tree.structure, tree):
            way_out = "jax.value_and_grad, and has_aux=True, return a pair: pass its gradients."
    raise ValueError(f"{name} and {other_name} {differ}: found {a}, expected {b}. {way_out}")


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `layers/0/kernel`; None for masked ones."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_masked):
        name = path_name(path)
        if name in named:
            raise ValueError(
                f"Two leaves have the path {name}; expected a path for each. Rename a key that has"
                " a slash in it."
            )
        named[name] = None if is_masked(leaf) else leaf
    return named


def is_masked(leaf: Any) -> bool:
    """True for None and for optax's placeholder of a masked leaf."""
    return leaf is None or type(leaf).__name__ == "MaskedNode"
