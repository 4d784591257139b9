"""Masks: which leaves a stage changes, by their paths and axes or by a tree of bools.

`matrices` and `named` return functions from parameters, in any container, to a tree of bools.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.trees import PyTree, path_name

__all__ = ["matrices", "named"]

Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None
"""A tree of bools of the parameters' structure or a prefix of it; a function that makes one from
the parameters; or None."""


def matrices(
    but: Sequence[str] = ("bias", "norm", "embed"), stacked: Sequence[str] = ()
) -> Callable[[PyTree], PyTree]:
    """A mask of the matrices of a model, which are usually decayed.

    It has the leaves of two axes at least, except those with one of some names in their paths, such
    as `embed` in `token_embedding/kernel`: a table of embeddings has rows that are separate
    vectors, and `bias`: attention has biases of several axes.

    Args:
      but: names, or parts of names, of leaves to leave out, in upper or lower case.
      stacked: names of parts that hold layers along their first axis, which is then not counted.

    Raises:
      TypeError: names are not a list of strings.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> layers = {"kernel": jnp.ones((3, 4, 4)), "scale": jnp.ones((3, 4))}
    >>> params = {"embedding": jnp.ones((9, 4)), "layers": layers, "head": jnp.ones((4, 9))}
    >>> adamfn.masks.matrices(stacked=["layers"])(params)
    {'embedding': False, 'head': True, 'layers': {'kernel': True, 'scale': False}}
    >>> tx = adamfn.adamw(weight_decay=0.1, mask=adamfn.masks.matrices(stacked=["layers"]))
    """
    left_out, layered = _has(but, "but"), _has(stacked, "stacked")
    return lambda params: jax.tree.map_with_path(
        lambda path, leaf: jnp.ndim(leaf) - layered(path) >= 2 and not left_out(path), params
    )


def named(*names: str) -> Callable[[PyTree], PyTree]:
    """A mask of the leaves with one of some names in their paths; names and errors as `matrices`.

    >>> import adamfn
    >>> adamfn.masks.named("layers")({"layers": {"kernel": 1.0}, "head": 1.0})
    {'head': False, 'layers': {'kernel': True}}
    """
    has = _has(names, "named")
    return lambda params: jax.tree.map_with_path(lambda path, leaf: has(path), params)


def _has(names: Sequence[str], what: str) -> Callable[[Any], bool]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{what} is {names!r}; expected names, a list of strings.")
    parts = [name.lower() for name in names]
    return lambda path: any(part in path_name(path).lower() for part in parts)


def broadcast_mask(name: str, mask: Mask, params: PyTree) -> list[bool]:
    """Whether the mask of the stage with this name has each leaf of the parameters, in order."""
    # A function is a leaf; a module that can be called is a tree (optax issue 1007).
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    for path, leaf in jax.tree.leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"{name}: the mask at {jax.tree_util.keystr(path) or 'the root'} is {leaf!r};"
                " expected True or False, known when the step is traced."
            )
    try:
        return [bool(yes) for yes in jax.tree.leaves(jax.tree.broadcast(mask, params))]
    except ValueError as error:
        raise ValueError(
            f"{name}: the mask's structure is not that of the parameters, nor a prefix"
            f" of it: found {jax.tree.structure(mask)}, expected {jax.tree.structure(params)}."
        ) from error
