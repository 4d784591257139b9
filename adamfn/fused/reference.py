"""The step of a leaf and of a group of leaves, by XLA: what every other backend is held to."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats import Format, noise
from adamfn.formats.base import noise_at
from adamfn.fused.scalars import Scalars
from adamfn.moments import ratio
from adamfn.trees import PyTree, real_dtype, wide_dtype


@dataclass(frozen=True)
class LeafStep:
    """The chain's formulas for one leaf, one after the other, and the parameter moved by them.

    Nothing between them is rounded to the gradient's dtype, as updates of a chain are.
    """

    format: Format | None
    """How its moments are stored; None for as they are."""
    nesterov: bool
    decays: bool
    """Whether weight decay moves it."""

    def __call__(
        self,
        number: jax.Array,
        g: jax.Array,
        p: jax.Array,
        mu: PyTree,
        nu: PyTree,
        count: jax.Array,
        scalars: Scalars,
        elements: jax.Array | None = None,
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """Returns the next mu, nu and parameter, with the dtypes that came.

        Args:
          number: the leaf's in the tree, for the noise of stochastic rounding.
          g: the gradient.
          p: the parameter.
          mu: its average as stored.
          nu: the average of its squares, likewise.
          count: the step, likewise for the noise.
          scalars: numbers and scalar arrays.
          elements: of a part of a leaf, the numbers that its elements have there, uint32 of g's
            shape; None for a whole leaf.
        """
        stored, dtype = (mu, nu), p.dtype
        g, p = g.astype(wide_dtype(g.dtype)), p.astype(wide_dtype(p.dtype))
        if self.format is not None:
            mu, nu = self.format.decode(mu, nu)
        widest = jnp.result_type(*(real_dtype(x.dtype) for x in (g, p, nu)))
        s = jax.tree.map(partial(jnp.asarray, dtype=widest), scalars)
        ahead = s.ahead if self.nesterov else None
        u, mu, nu = ratio(g, mu, nu, s.b1, s.b2, s.eps, s.eps_root, ahead)
        u = u * s.correction
        if self.decays:
            u = u + s.weight_decay * p
        p = p - s.learning_rate * u
        if self.format is not None:
            words = (
                noise(count, number, g.shape)
                if elements is None
                else noise_at(count, number, elements)
            )
            kept = self.format.encode(mu, nu, words)
        else:
            kept = mu.astype(stored[0].dtype), nu.astype(stored[1].dtype)
        return *kept, p.astype(dtype)


@dataclass(frozen=True)
class Group:
    """What is static of a group: leaves stored alike, that take a step in one call."""

    format: Format | None
    nesterov: bool
    decays: tuple[bool, ...]
    """Of each leaf: whether weight decay moves it."""
    stored: Any
    """The structure of the moments: a list with a pair (mu, nu) for each leaf, or one for all."""
    packed: bool
    """Whether there is one pair, of flat buffers in which float32 moments lie end to end."""

    @property
    def moments(self) -> int:
        """How many arrays the moments are."""
        return self.stored.num_leaves


def step_group(group: Group, *operands: jax.Array) -> list[jax.Array]:
    """The step of a group.

    Args:
      group: what is static of it.
      *operands: the scalars, float32[10]; the count, int32; the leaves' numbers, uint32[n]; the
        arrays of the moments; n gradients; n parameters.

    Returns:
      The next arrays of the moments, then the next parameters.
    """
    vector, count, numbers, *arrays = operands
    kept, leaves = arrays[: group.moments], arrays[group.moments :]
    grads, params = leaves[: len(group.decays)], leaves[len(group.decays) :]
    pairs = jax.tree.unflatten(group.stored, kept)
    scalars = Scalars(*vector)
    if not group.packed:
        moved = [
            LeafStep(group.format, group.nesterov, decays)(number, g, p, mu, nu, count, scalars)
            for decays, number, g, p, (mu, nu) in zip(
                group.decays, numbers, grads, params, pairs, strict=True
            )
        ]
        return [*jax.tree.leaves([pair for *pair, _ in moved]), *(p for *_, p in moved)]
    ((mu, nu),) = pairs
    sizes = [math.prod(p.shape) for p in params]
    if len(set(group.decays)) > 1:
        decays = jnp.asarray(np.repeat(np.array(group.decays, np.float32), sizes))
        scalars = scalars._replace(weight_decay=decays * scalars.weight_decay)
    step = LeafStep(None, group.nesterov, any(group.decays))
    mu, nu, flat = step(numbers, _flat(grads), _flat(params), mu, nu, count, scalars)
    ends = list(accumulate(sizes))
    moved = [
        flat[end - size : end].reshape(p.shape).astype(p.dtype)
        for p, size, end in zip(params, sizes, ends, strict=True)
    ]
    return [mu, nu, *moved]


def _flat(leaves: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])
