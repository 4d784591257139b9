"""Checkpoints of orbax: whether one fits the state that it is to be restored as.

Orbax saves a tree's keys, shapes and dtypes, and no types. It refuses another structure with a
list of all keys, and casts another dtype silently. orbax is not imported.
"""

import jax

from adamfn.trees import PyTree, describe, path_name


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

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn.interop.orbax import check_saved
    >>> params = {"kernel": jnp.zeros((64, 256))}
    >>> saved = adamfn.adam(moments="8bit").init(params)
    >>> check_saved(saved, saved)
    >>> check_saved(saved, adamfn.adam().init(params))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: check_saved: 5 parts of the checkpoint differ, the first at 0/mu/kernel: it holds
    int8[64,256]; expected float32[64,256]. Restore it with ...
    """
    if saved is None:
        raise ValueError(
            "check_saved: saved is None; expected the metadata of a checkpoint. Make the manager"
            " with item_handlers=orbax.checkpoint.StandardCheckpointHandler(): without it, the"
            " manager cannot read them before it has saved or restored."
        )
    found, expected = _arrays(getattr(saved, "tree", saved)), _arrays(like)
    differing = [path for path in {**expected, **found} if found.get(path) != expected.get(path)]
    parts = list(dict.fromkeys(_part(path, found, expected) for path in differing))
    if parts:
        raise ValueError(
            f"check_saved: {len(parts)} part{'s' * (len(parts) > 1)} of the checkpoint"
            f" differ{'s' * (len(parts) == 1)}, the first at {parts[0] or 'the root'}: it holds"
            f" {_below(parts[0], found)}; expected {_below(parts[0], expected)}. Restore it with"
            " the chain, the parameters and the moments= that it was saved with."
        )


def _arrays(tree: PyTree) -> dict[str, str]:
    return {path_name(path): describe(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _part(path: str, *sides: dict[str, str]) -> str:
    """The array that this one is part of: the shortest beginning of its path that is one."""
    keys = path.split("/")
    beginnings = ("/".join(keys[:length]) for length in range(len(keys)))
    return next((part for part in beginnings if any(part in side for side in sides)), path)


def _below(part: str, side: dict[str, str]) -> str:
    """The array at a path, or all arrays below it."""
    if part in side:
        return side[part]
    inner = [f"{p[len(part) + 1 :]} {a}" for p, a in side.items() if p.startswith(f"{part}/")]
    return ", ".join(inner) or "nothing"
