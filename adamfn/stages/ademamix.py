# SPDX-License-Identifier: Apache-2.0
"""AdEMAMix: Adam with a second, slow average of the gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core import formulas
from adamfn.core.averages import Averages, decay
from adamfn.core.hyperparameters import ScalarOrSchedule, explained, scheduled, value_at
from adamfn.core.masks import Mask
from adamfn.core.stage import Scalars, exported_state, zeros
from adamfn.formats import Moments, check_moments, with_mu_dtype
from adamfn.stages.moments import PAIR, from_moments
from adamfn.stages.rates import add_decayed_weights, scale_by_lr
from adamfn.trees import Numeric, PyTree


@exported_state
class ScaleByAdemamixState(NamedTuple):
    """State of `scale_by_ademamix`: a `ScaleByMomentsState`, and the slow average."""

    count: jax.Array
    mu: PyTree
    nu: PyTree
    mu_slow: PyTree
    scales: PyTree


@explained
def ademamix(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask = None,
    *,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""AdEMAMix, by Pagliardini, Ablin and Grangier (2024, arXiv 2409.03137): AdamW that remembers.

    The update of `scale_by_ademamix` takes the place of Adam's in `adamw`. The state takes 12 bytes
    a parameter in float32. Arguments as in `optax.contrib.ademamix`; with a weight_decay of 0 there
    is no such stage.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.ademamix(learning_rate=0.1)
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0].round(3))
    [-0.1  0.1]
    """
    ratio = scale_by_ademamix(
        b1, b2, b3, alpha, eps, eps_root, mu_dtype, moments=moments, seed=seed
    )
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    decay = [] if none else [add_decayed_weights(weight_decay, mask)]
    return chain(ratio, *decay, scale_by_lr(learning_rate))


def scale_by_ademamix(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Adds a slow average of the gradients to Adam's fast one.

    $$ s \leftarrow s + (1 - b_3)(g - s), \qquad
    u = \frac{\hat m + \alpha s}{\sqrt{\hat v + \epsilon_\text{root}} + \epsilon} $$

    s is not corrected for its beginning at zero, so that it comes in slowly; no `bias_correct`
    belongs after this stage. b3, the decay of s, and alpha, its weight, are numbers, scalar arrays
    or functions of the count: the paper raises both over the run, from b1 and from 0. `"4bit"` does
    not bear a b3 above 0.95, nor a schedule of it. All else is as in `adam`.
    Source: arXiv 2409.03137, algorithm 1; as `optax.contrib.scale_by_ademamix`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.scale_by_ademamix(b3=0.5, alpha=2.0)
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0].round(4))
    [ 2. -2.]
    """
    averages, weight = Averages.of(b1, b2, eps, eps_root), scheduled("alpha", alpha)
    fixed = None if callable(b3) else decay("b3", b3)

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        slow = fixed or decay("b3", value_at("b3", b3, count - 1))
        share, root_of_c2 = value_at("alpha", weight, count - 1), jnp.sqrt(averages.b2.bias(count))
        return (averages.at_step(count), slow, (averages.correction(count), share * root_of_c2)), {}

    more = {"keeps": PAIR | {"mu_slow": zeros}, "state": ScaleByAdemamixState}
    name, formula, decays = "scale_by_ademamix", formulas.mixed_ratio, averages.decays
    slowest = 1.0 if fixed is None else 1 - fixed.complement  # a schedule rises towards 1
    moments = check_moments(with_mu_dtype(moments, mu_dtype), slowest, "b3")
    return from_moments(name, formula, moments, scalars, decays=decays, seed=seed, **more)
