"""Packing: the float32 moments of many small leaves, end to end in a few buffers.

To pass an array into a compiled call and out again costs some microseconds, more than a step of
Adam on a thousand elements. So small leaves share buffers, up to 64 leaves each.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.trees import PyTree

SMALL = 32768
"""Leaves of fewer elements are packed."""

_LEAVES = 64
"""Leaves of one buffer. The time that XLA takes to compile a call grows with the square."""


class Packed(NamedTuple):
    """One moment of a tree of parameters."""

    leaves: PyTree
    """What is kept of each leaf by itself: the parameters' tree, None where a leaf is packed."""
    buffers: tuple[jax.Array, ...]
    """The others' float32 moments, end to end in the order of the leaves: of shape (elements,)."""


def may_pack(leaf: Any) -> bool:
    """Whether a leaf with moments in float32 is packed.

    It is if it is small, and lies on one device. Of a traced one that cannot be seen, and it is
    packed if JAX has no other device: what is sharded is never packed.
    """
    small = jnp.size(leaf) < SMALL and jnp.result_type(leaf) in (jnp.float32, jnp.bfloat16)
    if isinstance(leaf, Tracer):
        return small and jax.device_count() == 1
    sharding = getattr(leaf, "sharding", None)
    return small and (sharding is None or len(sharding.device_set) == 1)


def runs(packed: Sequence[int]) -> list[list[int]]:
    """The packed leaves, by their numbers, as they share buffers."""
    return [list(packed[i : i + _LEAVES]) for i in range(0, len(packed), _LEAVES)]


def elements(leaves: Sequence[Any], run: Sequence[int]) -> int:
    """How many elements the leaves of a run have together."""
    return sum(math.prod(jnp.shape(leaves[number])) for number in run)


def packed_leaves(moment: Packed, treedef: Any) -> list[int]:
    """The numbers of the leaves that are packed, in a tree of this structure."""
    parts = treedef.flatten_up_to(moment.leaves)
    return [number for number, part in enumerate(parts) if part is None]


def pack(tree: PyTree, treedef: Any, packed: Sequence[int]) -> Packed:
    """Packs some leaves of a tree of moments.

    Args:
      tree: the tree.
      treedef: the parameters' structure.
      packed: the numbers of the leaves to pack; arrays of float32.
    """
    parts = treedef.flatten_up_to(tree)
    buffers = [jnp.concatenate([parts[k].reshape(-1) for k in run]) for run in runs(packed)]
    for number in packed:
        parts[number] = None
    return Packed(treedef.unflatten(parts), tuple(buffers))


def unpack(moment: Packed, leaves: Sequence[Any], treedef: Any) -> PyTree:
    """The tree of moments that was packed.

    Args:
      moment: one moment, packed.
      leaves: arrays of the parameters' shapes.
      treedef: the parameters' structure.
    """
    parts = treedef.flatten_up_to(moment.leaves)
    for run, buffer in zip(runs(packed_leaves(moment, treedef)), moment.buffers, strict=True):
        start = 0
        for number in run:
            shape = jnp.shape(leaves[number])
            parts[number] = buffer[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
    return treedef.unflatten(parts)
