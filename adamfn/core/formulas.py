"""The formulas of Adam and its kin for one leaf: the mathematics, each written once.

They are those of `Stage`: functions of the updates, of what the stage reads and keeps, and of its
scalars. `backends/native` repeats some in C++, and a test holds it to them.
"""

import jax
import jax.numpy as jnp

from adamfn.core import weights
from adamfn.core.angle import angle
from adamfn.core.averages import Shares, average, average_moments, bounded
from adamfn.formats.quotients import quotient, root


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


def where_agreeing(u: jax.Array, g: jax.Array, floor: jax.Array, share: jax.Array) -> jax.Array:
    """The formula of `cautious_updates`."""
    return jnp.where(_inner(u, g) > 0, u / jnp.maximum(share, floor), 0)


def agreeing(u: jax.Array, g: jax.Array, floor: jax.Array) -> jax.Array:
    """What `cautious_updates` takes the mean of."""
    return (_inner(u, g) > 0).astype(jnp.real(u).dtype)


def clip_outgrown(
    u: jax.Array,
    g: jax.Array,
    nu: jax.Array,
    root: jax.Array,
    least: jax.Array,
    outgrown: jax.Array,
) -> jax.Array:
    """The formula of `clip_updates`."""
    return u / jnp.maximum(jnp.sqrt(outgrown) * root, 1)


def square_outgrown(
    u: jax.Array, g: jax.Array, nu: jax.Array, root: jax.Array, least: jax.Array
) -> jax.Array:
    """What `clip_updates` takes the mean of."""
    # The square of a ratio, and no ratio of squares: those may overflow. The root is not that of
    # the update's own denominator, which XLA would write to memory for both.
    ratio = jnp.abs(g) / jnp.sqrt(jnp.maximum(nu, least))
    return ratio * ratio


def if_taken(u: jax.Array, taken: jax.Array) -> jax.Array:
    """The formula of `skip_outliers`: the program holds back what `taken` says."""
    return u


def round_to_16(u: jax.Array, p: jax.Array, stored: jax.Array, noise: jax.Array) -> jax.Array:
    """The formula of `round_weights(16)`."""
    return weights.split_sum(p, u, 16, noise)[0] - stored


def round_to_24(
    u: jax.Array, p: jax.Array, stored: jax.Array, noise: jax.Array, correction: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The formula of `round_weights(24)`: `(u, correction)`."""
    return _landing(stored, *weights.split_sum(p, u, 24, noise))


def round_to_32(
    u: jax.Array, p: jax.Array, stored: jax.Array, noise: jax.Array, correction: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The formula of `round_weights(32)`: `(u, correction)`."""
    return _landing(stored, *weights.split(p + u, 32))


def _landing(
    stored: jax.Array, weight: jax.Array, correction: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # From 1 to 1e-9 in one step, the sum of weight and update lands beside: no correction fits.
    u = weight - stored
    lands = (stored + u).astype(jnp.bfloat16).astype(jnp.float32) == weight
    return u, jnp.where(lands, correction, 0)


def _inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of two real numbers; positive where two complex ones point the same way."""
    return jnp.real(x * jnp.conj(y))
