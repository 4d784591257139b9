# SPDX-License-Identifier: Apache-2.0
"""The formulas of Adam and its kin for one leaf: the mathematics, each written once.

The native code repeats some of them in C++, and tests compare the two.
"""

import math
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamfn.core.averages import Averages, Decay
from adamfn.formats.bits import quotient, root
from adamfn.trees import Numeric

Array: TypeAlias = jax.Array
Arrays: TypeAlias = tuple[Array, ...]
"""The update, then the arrays that the stage keeps."""


def multiply(u: Array, factor: Numeric) -> Array:
    """The formula of `bias_correct`, `scale_by_lr` and `clip_by_global_norm`."""
    return lax.mul(u, lax.full_like(u, factor))  # faster to trace than u * factor


def _plus(x: Array, term: Numeric) -> Array:
    return lax.add(x, lax.full_like(x, term))


def average(old: Array, new: Array, b: Decay) -> Array:
    """One step of the average, `b old + (1 - b) new`, from the nearer end.

    That rounds about half as much, and with b = 0 it returns `new` to the last bit.
    """
    step = lax.sub(new, old)
    from_old = lax.add(old, multiply(step, b.complement))
    return from_old if b.rate is None else jnp.where(b.rate < 0.5, new - b.rate * step, from_old)


def bounded(g: Array, largest: float | None = None) -> Array:
    """The gradient, with finite values beyond 1.8e19 (in float64 1.3e154) set to that bound.

    Their squares would overflow, and the element would never recover. Adam's ratio hardly changes:
    both moments then hold this gradient and little else. Infinities and NaN stay visible.
    """
    info, largest = jnp.finfo(g.dtype), largest or _largest(g.dtype)
    if jnp.iscomplexobj(g):
        largest /= 2  # a sum of two squares
        size = jnp.maximum(abs(g.real), abs(g.imag))
        over = (size > largest) & (size <= info.max)
        return g * jnp.where(over, largest / jnp.where(over, size, 1), 1)
    finite = lax.le(lax.abs(g), lax.full_like(g, info.max))
    bound = np.array(largest, g.dtype)
    return lax.select(finite, lax.clamp(-bound, g, bound), g)


def _largest(dtype: Any) -> float:
    """The largest number whose square is finite, but for a margin."""
    return (2 - 2**-7) * (2.0**511 if jnp.finfo(dtype).bits == 64 else 2.0**63)


def averaged(g: Array, mu: Array, nu: Array, at: Averages) -> tuple[Array, Array, Array]:
    """The bounded gradient, and both averages after it: of g and of |g|^2."""
    g = bounded(g)
    return g, average(mu, g, at.b1), average(nu, _square(g), at.b2)


def _square(g: Array) -> Array:
    return jnp.real(g * jnp.conj(g)) if jnp.iscomplexobj(g) else lax.mul(g, g)


def one_ahead(g: Array, mu: Array, at: Averages, factor: Array | None) -> Array:
    """Nesterov's momentum in Dozat's form; without a factor mu as it is."""
    share = at.b1.complement
    return mu if factor is None else mu * ((1 - share) * factor) + g * share


def root_of(nu: Array) -> Array:
    """The root of nu, of the smallest normal number at least.

    An element that never had a gradient is then divided by no 0, and has a derivative.
    """
    return root(lax.max(nu, lax.full_like(nu, jnp.finfo(nu.dtype).tiny)))


def over_root(m: Array, nu: Array, at: Averages) -> Array:
    """`m / (sqrt(nu + eps_root) + eps)`."""
    return quotient(m, _plus(root_of(_plus(nu, at.eps_root)), at.eps))


def unchanged(u: Array) -> Array:
    """The formula of a stage that changes no update, such as `skip_outliers`."""
    return u


def add_multiple(u: Array, p: Array, rate: Array) -> Array:
    """The formula of `add_decayed_weights` and `add_corrected_decay`."""
    return lax.add(u, multiply(p, rate))


def add_agreeing_multiple(u: Array, p: Array, rate: Array) -> Array:
    """The formula of a cautious `add_decayed_weights`."""
    return u + jnp.where(_inner(u, p) >= 0, rate, 0) * p


def average_of_new(u: Array, new: Array, old_average: Array, share: Array) -> Arrays:
    """The formula of `average_weights`."""
    return u, lax.add(old_average, multiply(lax.sub(new, old_average), share))


def ratio(g: Array, mu: Array, nu: Array, at: Averages, ahead: Array | None) -> Arrays:
    """The formula of `scale_by_moments`."""
    g, mu, nu = averaged(g, mu, nu, at)
    return over_root(one_ahead(g, mu, at, ahead), nu, at), mu, nu


def max_ratio(g: Array, mu: Array, nu: Array, nu_max: Array, at: Averages) -> Arrays:
    """The formula of `scale_by_max_moments`."""
    _, mu, nu = averaged(g, mu, nu, at)
    nu_max = jnp.maximum(nu_max, nu)
    return over_root(mu, nu_max, at), mu, nu, nu_max


def nesterov_ratio(
    g: Array, mu: Array, nu: Array, at: Averages, of_mu: Array, of_g: Array
) -> Arrays:
    """The formula of `scale_by_nesterov_moments`."""
    g, mu, nu = averaged(g, mu, nu, at)
    return over_root(of_mu * mu + of_g * g, nu, at), mu, nu


def rectified_ratio(
    g: Array,
    mu: Array,
    nu: Array,
    at: Averages,
    rectification: Array,
    untrusted: Array,
    ahead: Array | None,
) -> Arrays:
    """The formula of `scale_by_rectified_moments`."""
    g, mu, nu = averaged(g, mu, nu, at)
    factor = jnp.where(rectification > 0, over_root(rectification, nu, at), untrusted)
    return one_ahead(g, mu, at, ahead) * factor, mu, nu


def infinity_ratio(g: Array, mu: Array, nu: Array, at: Averages) -> Arrays:
    """The formula of `scale_by_infinity_moments`."""
    g = bounded(g, float(jnp.finfo(g.dtype).max) / 4)  # a difference of two would overflow
    mu = average(mu, g, at.b1)
    # b2 nu as an average with 0: products with a rounded b2 would drift, the same way each step.
    nu = jnp.maximum(average(nu, jnp.zeros_like(nu), at.b2), jnp.abs(g) + at.eps)
    return mu / jnp.maximum(nu, jnp.finfo(nu.dtype).tiny), mu, nu


def atan2_ratio(
    g: Array, mu: Array, nu: Array, at: Averages, correction: Array, a: Array, b: Array
) -> Arrays:
    """The formula of `scale_by_atan2_moments`."""
    _, mu, nu = averaged(g, mu, nu, at)
    size = a * angle(jnp.abs(mu) * correction, b * root_of(nu))
    return size * jnp.sign(mu), mu, nu  # the sign of a complex number is its direction


def mixed_ratio(
    g: Array, mu: Array, nu: Array, mu_slow: Array, at: Averages, b3: Decay, of_both: Arrays
) -> Arrays:
    """The formula of `scale_by_ademamix`."""
    g, mu, nu = averaged(g, mu, nu, at)
    mu_slow = average(mu_slow, g, b3)
    return over_root(of_both[0] * mu + of_both[1] * mu_slow, nu, at), mu, nu, mu_slow


def normalized_average(
    g: Array,
    mu: Array,
    nu: Array,
    at: Averages,
    started: Array,
    bound: Array | None,
    ahead: Decay | None,
) -> Arrays:
    """The formula of `scale_by_adopt`. It keeps m in the gradient's units, as formats store mu."""
    g, divisor = bounded(g), jnp.maximum(root(nu), at.eps)
    divisor = jnp.where(divisor > 0, divisor, 1)
    x = quotient(g, divisor)
    if bound is not None:
        size = jnp.abs(x)
        x = jnp.where(size > bound, x * (bound / jnp.where(size > bound, size, 1)), x)
    x = jnp.where(started > 0, x, 0)
    m = average(quotient(mu, divisor), x, at.b1)
    nu = jnp.where(started > 0, average(nu, _square(g), at.b2), _square(g))
    return m if ahead is None else average(m, x, ahead), m * jnp.maximum(root(nu), at.eps), nu


def lazy_ratio(g: Array, mu: Array, nu: Array, at: Averages) -> Arrays:
    """The formula of `scale_by_lazy_moments`: not elementwise."""
    moves = jnp.any(g != 0, axis=-1, keepdims=True) if g.ndim else g != 0
    u, *new = ratio(g, mu, nu, at, None)
    kept = (jnp.where(moves, a, b) for a, b in zip(new, (mu, nu), strict=True))
    return jnp.where(moves, u, 0), *kept


def where_agreeing(u: Array, g: Array, floor: Array, first: int = 0) -> Array:
    """The formula of `cautious_updates`: not elementwise."""
    agrees = _inner(u, g) > 0
    share = _mean(agrees.astype(jnp.bfloat16), first, g.real.dtype)  # CPU adds these fastest
    return jnp.where(agrees, u / jnp.maximum(share, floor), 0)


def clip_outgrown(u: Array, g: Array, nu: Array, c2: Array, least: Array, first: int = 0) -> Array:
    """The formula of `clip_updates`: not elementwise."""
    # Not `bounded`, whose select XLA on CPU would write to memory.
    size = jnp.minimum(jnp.abs(g), _largest(nu.dtype))
    squares = size * size / jnp.maximum(nu, jnp.maximum(least, jnp.finfo(nu.dtype).tiny))
    return u / jnp.sqrt(jnp.maximum(_mean(squares, first, nu.dtype) * c2, 1))


where_agreeing_by_layer = partial(where_agreeing, first=1)
clip_outgrown_by_layer = partial(clip_outgrown, first=1)


def angle(opposite: Array, adjacent: Array) -> Array:
    """`arctan2(opposite, adjacent)` of numbers at least 0; 0 where both are 0.

    In float32 it is a polynomial for angles up to pi / 8, and a sum of angles for larger ones. It
    is right to 3e-7, and on CPU some ten times as fast as `jnp.arctan2`.
    """
    if opposite.dtype != jnp.float32:
        both_zero = (opposite == 0) & (adjacent == 0)  # where it has no derivative
        return jnp.arctan2(opposite, jnp.where(both_zero, 1, adjacent))
    shorter, longer = jnp.minimum(opposite, adjacent), jnp.maximum(opposite, adjacent)
    # Both infinite or both zero: pi / 4 and 0, as XLA has it.
    equal = shorter == longer
    ratio = shorter / jnp.where(equal, 1, longer)
    t = jnp.where(equal, jnp.where(longer > 0, 1.0, 0.0), ratio)
    steep = t > math.tan(math.pi / 8)
    x = jnp.where(steep, (t - 1) / (t + 1), t)
    z = x * x
    series = 8.05374449538e-2 * z - 1.38776856032e-1
    series = (series * z + 1.99777106478e-1) * z - 3.33329491539e-1  # Cephes, atanf
    found = series * z * x + x + jnp.where(steep, math.pi / 4, 0.0)
    return jnp.where(opposite > adjacent, math.pi / 2 - found, found)


def _mean(x: Array, first: int, dtype: Any) -> Array:
    """The mean over all axes from the first: of a leaf (0), or of its layers (1). 0 if empty."""
    axes = tuple(range(first, x.ndim))
    return jnp.sum(x, axes, dtype, keepdims=True) / max(math.prod(x.shape[first:]), 1)


def _inner(x: Array, y: Array) -> Array:
    """The product of two real numbers; positive where two complex ones point the same way."""
    return jnp.real(x * jnp.conj(y))
