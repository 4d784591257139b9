"""Which leaves of a tree share a buffer, and the tree with them in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains import segment as joined
from adamfn.core.bundle import Bundle
from adamfn.core.stage import Stage
from adamfn.trees import PyTree, check_inexact

_LEAVES = 64
"""Leaves of one buffer. The time that XLA takes to compile a call grows with the square."""


class Packed(NamedTuple):
    """A tree of parameters' shapes, with small leaves in buffers."""

    leaves: PyTree
    """What stands by itself: the parameters' tree, None where a leaf is packed."""
    buffers: Any
    """A tuple of the others, end to end: float32 of shape (elements,)."""


class Layout:
    """Which leaves of a tree share each buffer."""

    def __init__(self, stages: Sequence[Stage], params: PyTree, below: int) -> None:
        check_inexact(params, "packed: params")
        self.leaves, self.treedef = jax.tree.flatten(params)
        masks = joined.masks_of(stages, params, params)
        alike: dict[Any, list[int]] = {}
        for k, (leaf, *changed) in enumerate(zip(self.leaves, *masks, strict=True)):
            dtype = jnp.result_type(leaf)
            real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
            if real and jnp.size(leaf) < below:
                alike.setdefault(tuple(changed), []).append(k)
        self.runs = [
            own[i : i + _LEAVES] for own in alike.values() for i in range(0, len(own), _LEAVES)
        ]
        # The stages of a packed tree: a buffer has the mask of its leaves.
        self.stages = [
            replace(stage, mask=None if stage.mask is None else self.pack(mask, lambda own: own[0]))
            for stage, mask in zip(stages, map(self.treedef.unflatten, masks), strict=True)
        ]

    def pack(self, tree: PyTree, buffer: Callable[[list[Any]], Any]) -> Packed:
        """A tree of the parameters' structure with buffers made of the leaves that share one."""
        parts: list[Any] = self.treedef.flatten_up_to(tree)
        buffers = tuple(buffer([parts[k] for k in run]) for run in self.runs)
        shared = {k for run in self.runs for k in run}
        alone = [None if k in shared else part for k, part in enumerate(parts)]
        # One leaf instead of a tuple for a tree without leaves, as in storage.as_fields.
        return Packed(self.treedef.unflatten(alone), buffers if parts else jnp.zeros((0,)))

    def unpack(self, packed: Packed) -> PyTree:
        """The tree that was packed, from buffers or bundles."""
        parts: list[Any] = self.treedef.flatten_up_to(packed.leaves)
        for run, buffer in zip(self.runs, packed.buffers, strict=True):
            if not isinstance(buffer, Bundle):
                shapes = [jnp.shape(self.leaves[k]) for k in run]
                ends = accumulate(map(math.prod, shapes))
                buffer = [
                    buffer[end - math.prod(shape) : end].reshape(shape)
                    for shape, end in zip(shapes, ends, strict=True)
                ]
            for k, part in zip(run, buffer, strict=True):
                parts[k] = part
        return self.treedef.unflatten(parts)
