"""The formulas of Adam and its kin for one leaf: the mathematics, each written once.

They are those of `Stage`: functions of the updates, of what the stage reads and keeps, and of its
scalars. `backends/native` repeats some in C++, and a test holds it to them.
"""

import math

import jax
import jax.numpy as jnp

from adamfn.core.averages import Shares, average, average_moments, bounded
from adamfn.formats.bits import quotient, root


def ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: Shares,
    b2: Shares,
    eps: jax.Array,
    eps_root: jax.Array,
    ahead: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The formula of `scale_by_moments`: `(u, mu, nu)`."""
    g = bounded(g)
    mu, nu = average_moments(g, mu, nu, b1, b2)
    m = mu if ahead is None else mu * ((1 - b1.complement) * ahead) + g * b1.complement
    return quotient(m, root(nu + eps_root) + eps), mu, nu


def multiply(u: jax.Array, factor: jax.Array) -> jax.Array:
    """The formula of `bias_correct` and `scale_by_lr`."""
    return u * factor


def add_multiple(u: jax.Array, p: jax.Array, rate: jax.Array) -> jax.Array:
    """The formula of `add_decayed_weights`."""
    return u + rate * p


def max_ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    nu_max: jax.Array,
    b1: Shares,
    b2: Shares,
    eps: jax.Array,
    eps_root: jax.Array,
) -> tuple[jax.Array, ...]:
    """The formula of `scale_by_max_moments`: `(u, mu, nu, nu_max)`."""
    g = bounded(g)
    mu, nu = average_moments(g, mu, nu, b1, b2)
    nu_max = jnp.maximum(nu_max, nu)
    return quotient(mu, root(nu_max + eps_root) + eps), mu, nu, nu_max


def nesterov_ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: Shares,
    b2: Shares,
    eps: jax.Array,
    eps_root: jax.Array,
    of_mu: jax.Array,
    of_g: jax.Array,
) -> tuple[jax.Array, ...]:
    """The formula of `scale_by_nesterov_moments`: `(u, mu, nu)`."""
    g = bounded(g)
    mu, nu = average_moments(g, mu, nu, b1, b2)
    return quotient(of_mu * mu + of_g * g, root(nu + eps_root) + eps), mu, nu


def rectified_ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: Shares,
    b2: Shares,
    eps: jax.Array,
    eps_root: jax.Array,
    rectification: jax.Array,
    untrusted: jax.Array,
) -> tuple[jax.Array, ...]:
    """The formula of `scale_by_rectified_moments`: `(u, mu, nu)`."""
    g = bounded(g)
    mu, nu = average_moments(g, mu, nu, b1, b2)
    factor = jnp.where(
        rectification > 0, quotient(rectification, root(nu + eps_root) + eps), untrusted
    )
    return mu * factor, mu, nu


def infinity_ratio(
    g: jax.Array, mu: jax.Array, nu: jax.Array, b1: Shares, b2: Shares, eps: jax.Array
) -> tuple[jax.Array, ...]:
    """The formula of `scale_by_infinity_moments`: `(u, mu, nu)`."""
    mu = average(mu, g, b1)
    # b2 nu as an average with 0: a product with a rounded b2 would drift, the same way each step.
    nu = jnp.maximum(average(nu, jnp.zeros_like(nu), b2), jnp.abs(g) + eps)
    return mu / nu, mu, nu


def atan2_ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: Shares,
    b2: Shares,
    correction: jax.Array,
    a: jax.Array,
    b: jax.Array,
) -> tuple[jax.Array, ...]:
    """The formula of `scale_by_atan2_moments`: `(u, mu, nu)`."""
    g = bounded(g)
    mu, nu = average_moments(g, mu, nu, b1, b2)
    size = a * angle(jnp.abs(mu) * correction, b * jnp.sqrt(nu))
    return size * jnp.sign(mu), mu, nu  # the sign of a complex number is its direction


def add_agreeing_multiple(u: jax.Array, p: jax.Array, rate: jax.Array) -> jax.Array:
    """The formula of a cautious `add_decayed_weights`."""
    return u + jnp.where(_inner(u, p) >= 0, rate, 0) * p


def where_agreeing(
    u: jax.Array, g: jax.Array, floor: jax.Array, *, layers: bool = False
) -> jax.Array:
    """The formula of `cautious_updates`: not elementwise."""
    agrees = _inner(u, g) > 0
    share = _mean(agrees.astype(jnp.real(u).dtype), layers=layers)
    return jnp.where(agrees, u / jnp.maximum(share, floor), 0)


def where_agreeing_by_layer(u: jax.Array, g: jax.Array, floor: jax.Array) -> jax.Array:
    """The same, for each layer along the first axis by itself."""
    return where_agreeing(u, g, floor, layers=True)


def clip_outgrown(
    u: jax.Array,
    g: jax.Array,
    nu: jax.Array,
    root: jax.Array,
    least: jax.Array,
    *,
    layers: bool = False,
) -> jax.Array:
    """The formula of `clip_updates`: not elementwise."""
    # The square of a ratio, and no ratio of squares: those may overflow.
    ratio = jnp.abs(g) / jnp.sqrt(jnp.maximum(nu, least))
    return u / jnp.maximum(jnp.sqrt(_mean(ratio * ratio, layers=layers)) * root, 1)


def clip_outgrown_by_layer(
    u: jax.Array, g: jax.Array, nu: jax.Array, root: jax.Array, least: jax.Array
) -> jax.Array:
    """The same, for each layer along the first axis by itself."""
    return clip_outgrown(u, g, nu, root, least, layers=True)


def _mean(x: jax.Array, *, layers: bool) -> jax.Array:
    """The mean of a leaf, or of each of its layers along the first axis; 0 of an empty one."""
    axes = tuple(range(1 if layers else 0, x.ndim))
    number = max(math.prod(x.shape[axis] for axis in axes), 1)
    return jnp.sum(x, axes, keepdims=True) / number


def unchanged(u: jax.Array) -> jax.Array:
    """The formula of a stage that changes no update, such as `skip_outliers`."""
    return u


def lazy_ratio(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: Shares,
    b2: Shares,
    eps: jax.Array,
    eps_root: jax.Array,
) -> tuple[jax.Array, ...]:
    """The formula of `scale_by_lazy_moments`: `(u, mu, nu)`. Not elementwise."""
    moves = jnp.any(g != 0, axis=-1, keepdims=True) if g.ndim else g != 0
    u, *new = ratio(g, mu, nu, b1, b2, eps, eps_root, None)
    kept = (jnp.where(moves, a, b) for a, b in zip(new, (mu, nu), strict=True))
    return jnp.where(moves, u, 0), *kept


def angle(opposite: jax.Array, adjacent: jax.Array) -> jax.Array:
    """`arctan2(opposite, adjacent)` of numbers at least 0; 0 where both are.

    In float32 by a polynomial for angles up to an eighth of a circle's quarter and the sums of
    angles for the others, right to 3e-7: on CPU some ten times as fast as `jnp.arctan2`.
    """
    if opposite.dtype != jnp.float32:
        return jnp.arctan2(opposite, adjacent)
    shorter, longer = jnp.minimum(opposite, adjacent), jnp.maximum(opposite, adjacent)
    # Both infinite, or both zero: as XLA has it, an eighth of the circle, and 0.
    t = jnp.where(shorter == longer, jnp.where(longer > 0, 1.0, 0.0), shorter / longer)
    steep = t > math.tan(math.pi / 8)
    x = jnp.where(steep, (t - 1) / (t + 1), t)
    z = x * x
    series = 8.05374449538e-2 * z - 1.38776856032e-1
    series = (series * z + 1.99777106478e-1) * z - 3.33329491539e-1  # Cephes, atanf
    found = series * z * x + x + jnp.where(steep, math.pi / 4, 0.0)
    return jnp.where(opposite > adjacent, math.pi / 2 - found, found)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two real numbers; positive where two complex ones point the same way."""
    return jnp.real(x * jnp.conj(y))
