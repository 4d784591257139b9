"""Checkpoints of orbax: whether one is of the state that it is to be restored as.

Orbax keeps a tree's keys, shapes and dtypes, and no types. It refuses another structure with a
list of all keys, and casts another dtype without a word. orbax is not imported.
"""

from typing import Any

import jax

from adamfn.formats.arrangement import holds_moments, kept_leaves
from adamfn.trees import PyTree, describe, path_name


def check_saved(saved: PyTree, like: PyTree) -> None:
    """Checks that a checkpoint holds what it is to be restored as.

    Args:
      saved: what `item_metadata(step)` returns, of a `CheckpointManager` that was made with
        `item_handlers=StandardCheckpointHandler()`.
      like: the tree to restore, or its shapes and dtypes, such as
        `jax.eval_shape(lambda: {"params": params, "state": tx.init(params)})`.

    Raises:
      ValueError: they differ in structure, in a shape or in a dtype: names the part that does.
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
            " with item_handlers=orbax.checkpoint.StandardCheckpointHandler(): without, it does not"
            " know how to read them before it has saved or restored."
        )
    found, expected = _arrays(getattr(saved, "tree", saved)), _arrays(like)
    differing = [path for path in {**expected, **found} if found.get(path) != expected.get(path)]
    parts = {_part(path, found, expected): None for path in differing}
    for part in parts:
        raise ValueError(
            f"check_saved: {len(parts)} part{'s' * (len(parts) > 1)} of the checkpoint"
            f" differ{'s' * (len(parts) == 1)}, the first at {part or 'the root'}"
            f"{_leaf_of_scales(part, like)}: it holds"
            f" {_below(part, found)}; expected {_below(part, expected)}. Restore it with the chain,"
            " the parameters and the moments= that it was saved with."
        )


def _leaf_of_scales(part: str, like: PyTree) -> str:
    """Of which leaf the scales at a path are, which says only its number; empty for others."""
    nodes: list[tuple[Any, Any]] = jax.tree.leaves_with_path(like, is_leaf=holds_moments)
    for where, node in nodes:
        for number, leaf in enumerate(kept_leaves(node) if holds_moments(node) else ()):
            entry = "/".join(filter(None, (path_name(where), "scales", str(number))))
            if part == entry or part.startswith(f"{entry}/"):
                return f", of the leaf at {path_name(leaf.path) or 'the root'}"
    return ""


def _arrays(tree: PyTree) -> dict[str, str]:
    leaves: list[tuple[Any, Any]] = jax.tree.leaves_with_path(tree)
    return {path_name(path): describe(leaf) for path, leaf in leaves}


def _part(path: str, *sides: dict[str, str]) -> str:
    """The array that this one is stored of: the shortest beginning of its path that is one."""
    keys = path.split("/")
    for length in range(len(keys)):
        beginning = "/".join(keys[:length])
        if any(beginning in side for side in sides):
            return beginning
    return path


def _below(part: str, side: dict[str, str]) -> str:
    if part in side:
        return side[part]
    inner = [f"{p[len(part) + 1 :]} {a}" for p, a in side.items() if p.startswith(f"{part}/")]
    return ", ".join(inner) or "nothing"
