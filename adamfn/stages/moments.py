# SPDX-License-Identifier: Apache-2.0
"""Two averages, their ratio, and the correction for their beginning at zero."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core import formulas
from adamfn.core.averages import NO_DECAY, Averages, decay, decays_of
from adamfn.core.stage import Scalars, Stage, exported_state, real_zeros, zeros
from adamfn.formats import Moments
from adamfn.trees import Numeric, PyTree


@exported_state
class ScaleByMomentsState(NamedTuple):
    """State of a stage that keeps two moments."""

    count: jax.Array
    """Steps taken: int32 scalar."""
    mu: PyTree
    """The average m of the gradients, in the parameters' tree and shapes: float32 at least, or the
    codes of a format, and None where it has none."""
    nu: PyTree
    """The average v of their squares (of |g|^2 for a complex leaf): likewise, and real."""
    scales: PyTree
    """The scales of formats, by the paths of the leaves that have any."""


@exported_state
class ScaleByMaxMomentsState(NamedTuple):
    """State of `scale_by_max_moments`: a `ScaleByMomentsState`, and the largest v so far."""

    count: jax.Array
    mu: PyTree
    nu: PyTree
    nu_max: PyTree
    scales: PyTree


@exported_state
class ScaleByInfinityMomentsState(NamedTuple):
    """State of `scale_by_infinity_moments`: a `ScaleByMomentsState`, whose nu is no average."""

    count: jax.Array
    mu: PyTree
    nu: PyTree
    scales: PyTree


PAIR = {"mu": zeros, "nu": real_zeros}
"""What a stage of moments keeps of each leaf."""


def from_moments(
    name: str, formula: Callable[..., Any], moments: Moments, scalars: Any, **more: Any
) -> GradientTransformation:
    """The transformation of a stage that keeps mu and nu; `more` are other fields of `Stage`."""
    more = {"keeps": PAIR, "state": ScaleByMomentsState} | more
    return from_stage(Stage(name, formula, scalars=scalars, moments=moments, **more))


def scale_by_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    nesterov: bool = False,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of the average of their squares.

    With $c_i = 1 - b_i^t$ at step $t = 1, 2, \ldots$, and both averages from zero:

    $$ m \leftarrow m + (1 - b_1)(g - m), \qquad v \leftarrow v + (1 - b_2)(|g|^2 - v), \qquad
    u = \frac{m}{\sqrt{v + c_2\,\epsilon_\text{root}} + \sqrt{c_2}\,\epsilon} $$

    `bias_correct` corrects u by $\sqrt{c_2} / c_1$. eps is in units of the *corrected* root: both
    stages give exactly $\hat m / (\sqrt{\hat v} + \epsilon)$. With `nesterov`, m in the ratio is
    $b_1 m\, c_1(t) / c_1(t + 1) + (1 - b_1) g$. Sources: Kingma and Ba, Adam: A Method for
    Stochastic Optimization, 2015, algorithm 1 (arXiv 1412.6980); Dozat, Incorporating Nesterov
    Momentum into Adam, 2016, algorithm 2.

    Args: as in `adam`, and
      moments: how they are stored: `"float32"`, `"bfloat16"`, `"8bit"`, `"4bit"`, `"factored"`,
        `"blockmean"`, a format of `adamfn.formats`, or a function that chooses one from a leaf's
        path and the leaf. Those of a leaf that its format cannot hold (`adamfn.formats.describe`
        shows which) are float32, or float64 for float64 leaves; mu is complex for complex leaves.
      seed: of the noise that rounds them: an integer in [0, 2^32), or an array of one; None for 0.
        Transformations with equal seeds round the leaves of equal places in their trees alike. Give
        each replica another, and their errors average out.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_moments(b1=0.5, b2=0.75)
    >>> updates, state = tx.update(jnp.array([0.5, -4.0]), tx.init(jnp.zeros(2)))
    >>> print(updates)  # 0.5 g / sqrt(0.25 g^2), whatever the gradient's size
    [ 1. -1.]
    """
    averages = Averages.of(b1, b2, eps, eps_root)

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        return (averages.at_step(count), averages.ahead(count) if nesterov else None), {}

    name, formula, decays = "scale_by_moments", formulas.ratio, averages.decays
    return from_moments(name, formula, moments, scalars, decays=decays, seed=seed)


def scale_by_max_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    corrected: bool = True,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Divides the average of the gradients by the root of the largest average of squares so far.

    $$ v_\text{max} \leftarrow \max(v_\text{max}, v), \qquad
    u = \frac{m}{\sqrt{v_\text{max} + c_2\,\epsilon_\text{root}} + \sqrt{c_2}\,\epsilon} $$

    All else is as in `scale_by_moments`. If `bias_correct(b1, 0)` comes after it, and v stays
    uncorrected, `corrected=False` makes $c_2 = 1$. The maximum is of the uncorrected v, as in torch
    and the paper. (`optax.amsgrad` corrects v first.) Source: Reddi et al., On the Convergence of
    Adam and Beyond, 2018, algorithm 2 (arXiv 1904.09237).

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_max_moments(b1=0.0, b2=0.0)  # v is the last g^2
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> print(tx.update(jnp.array([1.0]), state)[0])
    [0.25]
    """
    averages = Averages.of(b1, b2, eps, eps_root)
    more = {"keeps": PAIR | {"nu_max": real_zeros}, "state": ScaleByMaxMomentsState}

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        return (averages.at_step(count) if corrected else averages,), {}

    name, formula, decays = "scale_by_max_moments", formulas.max_ratio, averages.decays
    return from_moments(name, formula, moments, scalars, decays=decays, seed=seed, **more)


def scale_by_infinity_moments(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Divides the average of the gradients by their largest magnitude, slowly forgotten.

    $$ v \leftarrow \max(b_2 v,\; |g| + \epsilon), \qquad u = m / v $$

    v is no average, so only m needs a correction, by `bias_correct(b1, 0)` after this stage. All
    else is as in `scale_by_moments`. It is algorithm 2 of that paper, with torch's eps.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_infinity_moments(b1=0.0, b2=0.5)
    >>> _, state = tx.update(jnp.array([4.0]), tx.init(jnp.zeros(1)))
    >>> print(tx.update(jnp.array([1.0]), state)[0])  # v is 2
    [0.5]
    """
    averages, name = Averages.of(b1, b2, eps), "scale_by_infinity_moments"
    more: dict[str, Any] = {"state": ScaleByInfinityMomentsState, "seed": seed}
    more["decays"] = averages.b1, NO_DECAY
    formula = formulas.infinity_ratio
    return from_moments(name, formula, moments, lambda *_: ((averages,), {}), **more)


def bias_correct(b1: Numeric | None = None, b2: Numeric | None = None) -> GradientTransformation:
    r"""Corrects a ratio of averages for their beginning at zero.

    $$ u \leftarrow u \sqrt{c_2} / c_1, \qquad c_i = 1 - b_i^t $$

    After t steps of a constant x, an average that began at zero holds $c x$ (Kingma and Ba, section
    3). The factor is right to 3e-7 at every step. With `b2=0` only the numerator is corrected, with
    `b1=0` only the denominator. Decays that are not given are those of the adamfn stage of moments
    before it in its chain, in wrappers of ours or not; given ones must agree with them. Under
    `optax.chain`, where it cannot see that stage, give it both: else they are 0.9 and 0.999.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.bias_correct(b1=0.9, b2=0.0)
    >>> mean = jnp.array([0.1])  # of a constant 1, after one step
    >>> print(tx.update(mean, tx.init(mean))[0].round(4))
    [1.]
    """
    first = None if b1 is None else decay("b1", b1)
    second = None if b2 is None else decay("b2", b2)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        decays = decays_of("bias_correct", extra["decays"], first, second)
        return (Averages(*decays, 0.0, 0.0).correction(count),), {}

    return from_stage(Stage("bias_correct", formulas.multiply, scalars=scalars))
