# SPDX-License-Identifier: Apache-2.0
r"""The figures of one leaf, or of each layer of a stacked one: float32 scalars.

| figure | of the n elements |
|---|---|
| `gradient`, `update`, `weight` | root mean squares, $\sqrt{\sum x^2 / n}$; of the old weight |
| `update_over_weight` | ratio of the two; 0 for a weight of zeros, which has no size yet |
| `zeros`, `still` | shares of the gradient and of the update that are exactly 0 |
| `rate` | the learning rate $\alpha$ of the step |
| `step_10`, `step_50`, `step_90` | quantiles of the effective step, $|u| / \alpha$ |
| `agreement` | share of nonzero gradients with the sign of mu |
| `signal` | mean of $\hat m^2 / \hat v$, where v is not 0 |
| `by_eps` | share of v > 0 with $\sqrt{\hat v} < \epsilon$: eps is most of the divisor |
| `lowest`, `highest`, `largest` | shares of nu's codes at either end, of mu's at the largest size |
| `lost` | share of nonzero updates that rounding a 16-bit weight loses: p + u = p |
| `not_finite_gradient`, `..._moments`, `..._weight` | how many elements are NaN or infinite |

`signal` is the square of Kingma and Ba's signal-to-noise ratio (2015, section 2.1): 1 for constant
gradients, (1 - b1) / (1 + b1) = 0.05 for noise alone. Of noise, the effective step has a median of
0.15, and 1/2 + asin(sqrt(1 - b1^2)) / pi = 0.64 agrees with mu, which has the gradient in it. The
CS231n notes watch update over weight (about 1e-3); LARS (You, Gitman and Ginsburg, 2017) keeps it
constant. Quantiles are interpolated from the shares below 23 steps from 2^-12 to 8, so no device
sorts or sends elements. They are right to a tenth; below 2^-12 they are 0.
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from adamfn.chains.transform import wide_sum
from adamfn.core.placement import vary_together
from adamfn.trees import wide_dtype

Figures = dict[str, Array]

_QUANTILES = {"step_10": 0.1, "step_50": 0.5, "step_90": 0.9}
_EDGES = np.exp2(np.array([*range(-12, -4), *np.arange(-4, 3.5, 0.5)], np.float32))  # of steps


class Moments(NamedTuple):
    """The decoded moments of a leaf, and what follows from them."""

    mu: Array
    nu: Array
    quotient: tuple[Array, Array] | None
    """Corrected mu over corrected root of nu, and where eps is most of it; None if not Adam's."""
    ends: dict[str, Array]  # where codes are at an end of their levels


@partial(jax.jit, static_argnames="axis")  # leaves of one shape are traced once
def measure(
    grad: Array, update: Array, param: Array, moments: Moments | None, rate: Any, axis: int | None
) -> Figures:
    """The figures of a leaf: scalars, or a vector of one for each layer along an axis."""
    axes = tuple(k for k in range(grad.ndim) if k != axis)
    number = max(math.prod(grad.shape[k] for k in axes), 1)

    def total(x: Array) -> Array:
        return jnp.sum(x, axes, dtype=jnp.float32)

    def count(where: Array) -> Array:
        return total(where.astype(jnp.bfloat16))  # XLA on CPU adds these up fastest

    def share(where: Array) -> Array:
        return count(where) / number

    def size(x: Array) -> Array:
        return jnp.sqrt(total(jnp.real(x * jnp.conj(x))) / number)

    def size_of_scaled(x: Array) -> Array:
        x = jnp.abs(x)
        scale = jnp.max(x, axes, keepdims=True, initial=0)
        scale = jnp.where(scale == 0, 1, scale)
        return (size(x / scale) * jnp.squeeze(scale, axes)).astype(jnp.float32)

    def not_finite(arrays: tuple[Array, ...]) -> Array:
        return sum((count(~jnp.isfinite(x)) for x in arrays), jnp.float32(0))

    g, u, p = (x.astype(wide_dtype(x.dtype)) for x in (grad, update, param))
    parts = {"gradient": (g,), "weight": (p,)} | ({"moments": moments[:2]} if moments else {})
    sizes = [size(x) for x in (g, u, p)]
    usual = [(x > 1e-12) & (x < 1e12) for x in sizes]  # no square overflows or vanishes
    usual += [total(jnp.abs(x - x)) == 0 for x in parts.get("moments", ())]  # else NaN
    # Most leaves are finite and of a usual size: they are read once, and not three times.
    gradient, moved, weight, *counts = jax.lax.cond(
        reduce(jnp.logical_and, map(jnp.all, usual)),
        lambda: vary_together([*sizes, *[jnp.zeros_like(sizes[0])] * len(parts)]),
        lambda: vary_together([*map(size_of_scaled, (g, u, p)), *map(not_finite, parts.values())]),
    )
    figures = {
        "gradient": gradient,
        "update": moved,
        "weight": weight,
        "update_over_weight": jnp.where(weight == 0, 0, moved / jnp.where(weight == 0, 1, weight)),
        "zeros": share(g == 0),
        "still": share(u == 0),
    }
    if rate is not None:
        rate = jnp.asarray(rate, jnp.float32)
        steps = jnp.abs(u) / jnp.where(rate == 0, 1, rate)
        # A loop: XLA makes one slow program of many sums of one array.
        below = jax.lax.map(lambda edge: share(steps < edge), _EDGES)
        figures["rate"] = jnp.broadcast_to(rate, weight.shape)
        figures |= {name: _quantile(part, below) for name, part in _QUANTILES.items()}
    if moments is not None:
        mu, nu, quotient, ends = moments
        alike = jnp.real(jnp.sign(mu) * jnp.conj(jnp.sign(g))) > 0
        figures["agreement"] = count(alike) / jnp.maximum(number - count(g == 0), 1)
        if quotient is not None:
            (ratio, by_eps), known = quotient, nu > 0
            of_known = jnp.maximum(count(known), 1)
            figures["signal"] = total(jnp.where(known, jnp.square(ratio), 0)) / of_known
            figures["by_eps"] = count(by_eps & known) / of_known
        figures |= {name: share(where) for name, where in ends.items()}
    if jnp.issubdtype(param.dtype, jnp.floating) and jnp.finfo(param.dtype).bits == 16:
        stays = wide_sum(param, update).astype(param.dtype) == param
        figures["lost"] = count(stays & (u != 0)) / jnp.maximum(number - count(u == 0), 1)
    return figures | {f"not_finite_{name}": x for name, x in zip(parts, counts, strict=True)}


def _quantile(share: float, below: Array) -> Array:
    """The step that a share of the elements is below, from the shares below the edges."""
    widths = np.diff(_EDGES).reshape(-1, *[1] * (below.ndim - 1))
    parts = jnp.clip((share - below[:-1]) / jnp.maximum(jnp.diff(below, axis=0), 1e-30), 0, 1)
    return jnp.where(below[0] >= share, 0, _EDGES[0] + jnp.sum(parts * widths, 0))
