"""Masks: which leaves a stage changes."""

from collections.abc import Callable

import jax
import numpy as np

from adamfn.trees import PyTree


def broadcast_mask(
    name: str, mask: PyTree | Callable[[PyTree], PyTree], params: PyTree
) -> list[bool]:
    """Whether a mask has each leaf of the parameters, in their order.

    Args:
      name: the stage, for error messages.
      mask: a tree of bools of the parameters' structure or a prefix of it, or a function that makes
        one from the parameters.
      params: the parameters.

    Raises:
      TypeError, ValueError: it has something else than bools, or does not fit the parameters.
    """
    # A function is a leaf; a module that can be called is a tree (optax issue 1007).
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    for path, leaf in jax.tree.leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"{name}: the mask at {jax.tree_util.keystr(path) or 'the root'} is"
                f" {leaf!r}; expected True or False, known when the step is traced."
            )
    try:
        return [bool(yes) for yes in jax.tree.leaves(jax.tree.broadcast(mask, params))]
    except ValueError as error:
        raise ValueError(
            f"{name}: the mask's structure is not that of the parameters, nor a prefix"
            f" of it: found {jax.tree.structure(mask)}, expected {jax.tree.structure(params)}."
        ) from error
