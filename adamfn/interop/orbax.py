# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of orbax: whether one fits the state that it is to be restored as.

Orbax saves a tree's keys, shapes and dtypes, and no types. It refuses another structure with a
list of all keys, and casts another dtype silently. orbax is not imported.
"""

import jax

from adamfn.trees import PyTree, described, path_name


def check_saved(saved: PyTree, like: PyTree) -> None:
    """Checks that a checkpoint holds what it is to be restored as.

    Args:
      saved: what `item_metadata(step)` returns, of a `CheckpointManager` that was made with
        `item_handlers=StandardCheckpointHandler()`.
      like: the tree to restore, or its shapes and dtypes, such as
        `jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})`.

    Raises:
      ValueError: they differ in structure, in a shape or in a dtype; names the first difference.
        Two chains whose states have the same fields, such as of other rates, are not told apart.

    >>> import adamfn, jax.numpy as jnp
    >>> from adamfn.interop.orbax import check_saved
    >>> params = {"kernel": jnp.zeros((64, 256))}
    >>> saved = adamfn.adam(moments="8bit").init(params)
    >>> check_saved(saved, saved)
    >>> check_saved(saved, adamfn.adam().init(params))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: check_saved: 5 arrays of the checkpoint differ, the first at 0/mu/kernel: it holds
    int8[64,256]; expected float32[64,256]. Restore it with ...
    """
    if saved is None:
        raise ValueError(
            "check_saved: saved is None; expected the metadata of a checkpoint. Make the manager"
            " with item_handlers=orbax.checkpoint.StandardCheckpointHandler(): without it, the"
            " manager cannot read them before it has saved or restored."
        )
    found, expected = (
        {path_name(path): described(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
        for tree in (getattr(saved, "tree", saved), like)
    )
    differing = [path for path in {**expected, **found} if found.get(path) != expected.get(path)]
    for path in differing:
        raise ValueError(
            f"check_saved: {len(differing)} arrays of the checkpoint differ, the first at"
            f" {path or 'the root'}: it holds {found.get(path, 'nothing')}; expected"
            f" {expected.get(path, 'nothing')}. Restore it with the chain, the parameters and the"
            " moments= that it was saved with."
        )
