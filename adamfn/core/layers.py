"""Leaves that hold layers along their first axis, as those of a model do that scans over them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from adamfn.core.masks import broadcast_mask
from adamfn.core.stage import Stage
from adamfn.trees import PyTree, describe, path_name


def layers_of(stages: Sequence[Stage], updates: PyTree, params: PyTree) -> list[list[bool]]:
    """Of each stage, whether each leaf holds layers along its first axis.

    Raises:
      ValueError: a leaf that is to hold some has no axes.
    """
    whole = updates if params is None else params
    found: list[list[bool]] = []
    for stage in stages:
        if stage.stacked is None:
            found.append([False] * len(jax.tree.leaves(updates)))
            continue
        found.append(broadcast_mask(f"{stage.name}: stacked", stage.stacked, whole))
        for (path, leaf), yes in zip(jax.tree.leaves_with_path(updates), found[-1], strict=True):
            if yes and jnp.ndim(leaf) == 0:
                raise ValueError(
                    f"{stage.name}: the leaf at {path_name(path) or 'the root'} is"
                    f" {describe(leaf)}; expected an axis of layers, as `stacked` has it."
                )
    return found
