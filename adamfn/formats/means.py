"""Means over axes of a leaf, of which there may be a shard alone."""

from collections.abc import Sequence

import jax

MeshAxes = tuple[tuple[str, ...], ...]
"""For each axis of a shard the mesh axes that split the whole leaf's; empty for a whole leaf."""


def mean_over(x: jax.Array, axis: int, split: MeshAxes) -> jax.Array:
    """The mean of the whole leaf over an axis, which is kept as 1.

    Args:
      x: the leaf; or a shard of it, inside `jax.shard_map`.
      axis: the axis.
      split: the mesh axes that the shards are along.
    """
    mean = x.mean(axis, keepdims=True)
    names = split[axis] if split else ()
    return jax.lax.pmean(mean, names) if names else mean


def whole_shape(shape: Sequence[int], split: MeshAxes) -> tuple[int, ...]:
    """The shape of the whole leaf that a shard of this shape is of."""
    if not split:
        return tuple(shape)
    return tuple(
        n * (int(jax.lax.psum(1, names)) if names else 1)
        for n, names in zip(shape, split, strict=True)
    )
