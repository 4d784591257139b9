# SPDX-License-Identifier: Apache-2.0
"""ADOPT: gradients are normalized before they are averaged."""

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core import formulas
from adamfn.core.averages import NO_DECAY, Averages
from adamfn.core.hyperparameters import ScalarOrSchedule, explained, value_at
from adamfn.core.stage import Scalars
from adamfn.formats import Moments, check_moments, with_mu_dtype
from adamfn.stages.moments import from_moments
from adamfn.stages.rates import scale_by_lr
from adamfn.trees import Numeric


def _fourth_root(count: jax.Array) -> jax.Array:
    return count**0.25


@explained
def adopt(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.9999,
    eps: Numeric = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[jax.Array], Numeric] = _fourth_root,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""ADOPT, by Taniguchi et al. (2024, arXiv 2411.02853): Adam that converges with any b2.

    $$ u = -\alpha\, m $$

    m and the arguments are as in `scale_by_adopt`. The first step only fills v, and moves nothing.
    For decoupled decay, chain `scale_by_adopt`, `add_decayed_weights` and `scale_by_lr`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, g = adamfn.adopt(learning_rate=0.1, b1=0.0), jnp.array([3.0, -5.0])
    >>> _, state = tx.update(g, tx.init(g))
    >>> print(tx.update(g, state)[0])
    [-0.1  0.1]
    """
    more: Any = {"nesterov": nesterov, "use_clipping": use_clipping, "clip_value_fn": clip_value_fn}
    ratio = scale_by_adopt(b1, b2, eps, mu_dtype, moments=moments, seed=seed, **more)
    return chain(ratio, scale_by_lr(learning_rate))


def scale_by_adopt(
    b1: Numeric = 0.9,
    b2: Numeric = 0.9999,
    eps: Numeric = 1e-6,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[jax.Array], Numeric] = _fourth_root,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Averages gradients that are divided by the root of the average of earlier squares.

    With $v_0 = g_0^2$ and $m_0 = 0$ from the first step, whose update is 0, at the others:

    $$ x = \operatorname{clip}\!\Big(\frac{g}{\max(\sqrt v, \epsilon)},\; c\Big), \qquad
    m \leftarrow m + (1 - b_1)(x - m), \qquad v \leftarrow v + (1 - b_2)(|g|^2 - v), \qquad u = m $$

    v does not know g yet where it divides it, so the two are independent: hence the convergence.
    clip_value_fn, c, is a function of the steps taken so far, their fourth root; use_clipping says
    whether x is clipped at all. With nesterov, $u = b_1 m + (1 - b_1) x$. All else is as in `adam`.
    No `bias_correct` belongs after it. The state's mu is $m \max(\sqrt v, \epsilon)$, in the
    gradients' units, in which formats store it. Source: arXiv 2411.02853, algorithms 1 and 2; as
    `optax.contrib.scale_by_adopt`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_adopt(b1=0.5)
    >>> _, state = tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))
    >>> print(tx.update(jnp.array([3.0, -50.0]), state)[0])  # half of x, which is at most 1
    [ 0.5 -0.5]
    """
    averages = Averages.of(b1, b2, eps)

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        bound = value_at("clip_value_fn", clip_value_fn, count - 1) if use_clipping else None
        return (averages, count > 1, bound, averages.b1 if nesterov else None), {}

    moments = check_moments(with_mu_dtype(moments, mu_dtype), 1 - averages.b1.complement)
    name = "scale_by_adopt"
    return from_moments(
        name, formulas.normalized_average, moments, scalars, decays=(NO_DECAY, NO_DECAY), seed=seed
    )
