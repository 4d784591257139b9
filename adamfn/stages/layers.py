"""Statistics of each layer, where layers are stacked along the first axis of a leaf."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.chains.chain import chain, from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.masks import broadcast_mask
from adamfn.core.stage import Stage
from adamfn.trees import PyTree, describe, path_name


def by_layer(
    stage: Stage,
    formula: Callable[..., Any],
    stacked: PyTree | Callable[[PyTree], PyTree] | None,
) -> GradientTransformation:
    """The transformation of a stage with a statistic, which is of each layer in stacked leaves.

    Args:
      stage: the stage, for leaves that are not stacked.
      formula: its formula for stacked leaves.
      stacked: which leaves are stacked, given like `mask`; None for none.
    """
    if stacked is None:
        return from_stage(stage)

    def leaves(params: PyTree) -> list[bool]:
        found = broadcast_mask(f"{stage.name}: stacked", stacked, params)
        for (path, leaf), yes in zip(jax.tree.leaves_with_path(params), found, strict=True):
            if yes and jnp.ndim(leaf) == 0:
                raise ValueError(
                    f"{stage.name}: the leaf at {path_name(path) or 'the root'} is"
                    f" {describe(leaf)}; expected an axis of layers, as `stacked` has it."
                )
        return found

    def mask(params: PyTree) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(params), leaves(params))

    def others(params: PyTree) -> PyTree:
        return jax.tree.map(lambda yes: not yes, mask(params))

    return chain(
        from_stage(replace(stage, mask=others)),
        from_stage(replace(stage, mask=mask, formula=formula)),
    )
