# SPDX-License-Identifier: Apache-2.0
"""Kin of `scale_by_moments`: other denominators, a momentum ahead, an angle, rows that stay."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains.transform import GradientTransformation
from adamfn.core import formulas
from adamfn.core.averages import NO_DECAY, Averages, Decay, increment
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import Scalars, exported_state
from adamfn.formats import Moments, check_moments, get
from adamfn.formats.format import answer
from adamfn.stages.moments import from_moments
from adamfn.trees import Numeric, PyTree


@exported_state
class ScaleByNesterovMomentsState(NamedTuple):
    """State of `scale_by_nesterov_moments`: a `ScaleByMomentsState`, and a product of momenta."""

    count: jax.Array
    mu: PyTree
    nu: PyTree
    scales: PyTree
    mu_product: jax.Array
    """The product of the momenta of all steps taken: a float scalar."""


def scale_by_nesterov_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    momentum_decay: Numeric = 4e-3,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Divides a momentum that looks one step ahead by the root of the average of squares.

    In the ratio of `scale_by_moments` it replaces m by $\bar m$, with a momentum $\mu_t$ that rises
    from about $b_1 / 2$ to $b_1$:

    $$ \mu_t = b_1 (1 - \tfrac12 \cdot 0.96^{t\psi}), \qquad
    \bar m = \frac{\mu_{t+1}\, m}{1 - \prod_{i=1}^{t+1} \mu_i}
      + \frac{(1 - \mu_t)\, g}{1 - \prod_{i=1}^{t} \mu_i} $$

    momentum_decay, $\psi$, is at least 0: in $1 / \psi$ steps the momentum's distance to b1 shrinks
    to 0.96 of itself. The products correct $\bar m$, and `bias_correct(0, b2)` after this stage the
    denominator. Source: Dozat, as in `scale_by_moments`, section 3; torch.optim.NAdam.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_nesterov_moments(b1=0.0, b2=0.0)  # no memory: the gradient's sign
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0])
    [ 1. -1.]
    """
    averages = Averages.of(b1, b2, eps, eps_root)
    log_rise = scalar("momentum_decay", momentum_decay) * math.log(0.96)

    def momentum(count: jax.Array) -> tuple[Numeric, Numeric]:
        missing, share = 0.5 * jnp.exp(count.astype(float) * log_rise), averages.b1.complement
        return (1 - share) * (1 - missing), share + (1 - share) * missing  # and 1 - it

    def scalars(count: jax.Array, state: Any, *_: Any) -> Scalars:
        now, complement = momentum(count)
        ahead, product = momentum(increment(count))[0], state.mu_product * now
        of_mu, of_g = ahead / (1 - product * ahead), complement / (1 - product)
        return (averages.at_step(count), of_mu, of_g), {"mu_product": product}

    moments = check_moments(moments, 1 - averages.b1.complement)
    start, decays = {"mu_product": lambda: jnp.ones((), float)}, (NO_DECAY, averages.b2)
    more = {"start": start, "state": ScaleByNesterovMomentsState, "decays": decays}
    name, formula = "scale_by_nesterov_moments", formulas.nesterov_ratio
    return from_moments(name, formula, moments, scalars, seed=seed, **more)


def scale_by_rectified_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    threshold: Numeric = 5.0,
    nesterov: bool = False,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of squares once that can be trusted.

    With all else as in `scale_by_moments`, and the number $\rho$ of gradients that v is worth:

    $$ \rho_\infty = \frac{2}{1 - b_2} - 1, \qquad \rho = \rho_\infty - 2 t b_2^t / c_2, \qquad
    r = \sqrt{\frac{(\rho - 4)(\rho - 2)\rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2)\rho}} $$

    $$ u = \frac{r\, m}{\sqrt{v + c_2\,\epsilon_\text{root}} + \epsilon} \;\text{ if } \rho > 5,
    \qquad u = \frac{m}{\sqrt{c_2}} \;\text{ otherwise} $$

    `bias_correct(b1, b2)` after it makes the second $m / c_1$. As in torch, eps is in units of the
    uncorrected root, and the threshold, at least 4, is 5 (the paper has 4 and no eps); with b2
    under 2/3, $\rho$ stays below. `nesterov` is as in `scale_by_moments`. Source: Liu et al., On
    the Variance of the Adaptive Learning Rate and Beyond, 2020, algorithm 2 (arXiv 1908.03265).

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_rectified_moments(b1=0.5)
    >>> updates, state = tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))
    >>> print((updates * 0.001**0.5).round(4))  # no division yet: the average of the gradients
    [ 1.5 -2.5]
    """
    averages, threshold = Averages.of(b1, b2, eps, eps_root), scalar("threshold", threshold)
    if isinstance(threshold, float) and threshold < 4:
        raise ValueError(f"threshold is {threshold}; expected 4 at least: below, r is not real.")

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        at, rho = averages.at_step(count), _gradients_in(averages.b2, count)
        rectification = jnp.where(rho > threshold, _rectification(rho, averages.b2), 0)
        untrusted = jax.lax.rsqrt(averages.b2.bias(count))
        ahead = averages.ahead(count) if nesterov else None
        return (at._replace(eps=averages.eps), rectification, untrusted, ahead), {}

    name, formula, decays = "scale_by_rectified_moments", formulas.rectified_ratio, averages.decays
    return from_moments(name, formula, moments, scalars, decays=decays, seed=seed)


def scale_by_atan2_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    a: Numeric = 1.27,
    b: Numeric = 1.0,
    *,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Adam's ratio as an angle, which needs no eps.

    $$ u = a \operatorname{atan2}(m / c_1,\; b \sqrt{v / c_2}) $$

    with all else as in `scale_by_moments`. a and b are at least 0. An update is at most
    $a \pi / 2$; a of 1.27, about $4 / \pi$, makes it 1 where $m = \sqrt v$. Gradients multiplied by
    any number give the same updates, as long as their squares are in the range of the moments'
    dtype. No `bias_correct` belongs after it. A complex m keeps its direction; its size goes into
    the angle. Source: Everett et al., Scaling Exponents Across Parameterizations and Optimizers,
    2024, section 4.3 (arXiv 2407.05872), with the a and b of the packages that implement it.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_atan2_moments()
    >>> g = jnp.array([3.0, -1e-9])
    >>> print(tx.update(g, tx.init(g))[0].round(2))
    [ 1. -1.]
    """
    averages, a, b = Averages.of(b1, b2), scalar("a", a), scalar("b", b)

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        return (averages, averages.correction(count), a, b), {}

    name, formula, decays = "scale_by_atan2_moments", formulas.atan2_ratio, averages.decays
    return from_moments(name, formula, moments, scalars, decays=decays, seed=seed)


def scale_by_lazy_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of squares, in rows with a gradient.

    $$ u = m / (\sqrt{v + c_2\,\epsilon_\text{root}} + \epsilon) $$

    with all else as in `scale_by_moments`. A row extends along the last axis: one embedding of a
    table of shape (tokens, features), or a whole vector; a scalar is a row by itself. Where a row's
    gradient is all zero, m and v stay as they are, and $u = 0$. The count, and with it
    `bias_correct` after this stage, goes on for all rows alike. eps is in units of the uncorrected
    root. `init` refuses a format in which several rows share a number, such as `"factored"`. As
    torch.optim.SparseAdam, whose sparse gradients name the rows that are found here.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, g = adamfn.scale_by_lazy_moments(b1=0.0, b2=0.0), jnp.array([[0.0, 0.0], [5.0, -5.0]])
    >>> print(tx.update(g, tx.init(g))[0])
    [[ 0.  0.]
     [ 1. -1.]]
    """
    averages, moments = Averages.of(b1, b2, eps, eps_root), _stored_by_rows(moments)

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        return (averages.at_step(count)._replace(eps=averages.eps),), {}

    name, formula, decays = "scale_by_lazy_moments", formulas.lazy_ratio, averages.decays
    return from_moments(
        name, formula, moments, scalars, elementwise=False, decays=decays, seed=seed
    )


def _gradients_in(b2: Decay, count: jax.Array) -> jax.Array:
    """The number rho of gradients that an average is worth after `count` steps."""
    steps, x = count.astype(float), jnp.negative(b2.log)
    # Where t x is small, its two large terms cancel; there it is L(x / 2) + t (1 - L(t x / 2)).
    early = _langevin(x / 2) + steps * (1 - _langevin(steps * x / 2))
    late = 2 / b2.complement - 1 - 2 * steps / jnp.expm1(steps * x)
    return jnp.where(steps * x < 1, early, late)


def _langevin(z: Numeric) -> Numeric:
    """L(z) = coth z - 1 / z: its continued fraction, right to 1e-8 for z up to 1/2."""
    return z / (3 + z * z / (5 + z * z / (7 + z * z / 9)))


def _rectification(rho: jax.Array, b2: Decay) -> jax.Array:
    # Not used below 4, where a root may be negative.
    rho, rho_inf = jnp.maximum(rho, 4), jnp.maximum(2 / b2.complement - 1, 5)
    return jnp.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def _stored_by_rows(moments: Moments) -> Moments:
    """The formats, if each row of a leaf can keep its moments in them; `init` refuses others."""
    moments = check_moments(moments)

    def choose(path: str, leaf: Any) -> Any:
        format = get(moments(path, leaf) if callable(moments) else moments)
        if format.holds(leaf.shape, leaf.dtype) and not answer(format, "stores_rows"):
            raise ValueError(
                f"scale_by_lazy_moments: the format of the leaf at {path or 'the root'} stores"
                " several rows in one number; expected one in which a row can keep its moments,"
                " such as 'bfloat16' or '8bit'."
            )
        return format

    return choose if callable(moments) or not answer(get(moments), "stores_rows") else moments
