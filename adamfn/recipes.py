# SPDX-License-Identifier: Apache-2.0
r"""Adam and its kin: chains that read as their formulas.

`adam` explains the arguments; $\hat m$ and $\hat v$ are its corrected averages everywhere. The
stages say more, and name the papers in full.
"""

from typing import Any

from jax.typing import DTypeLike

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule, explained
from adamfn.core.masks import Mask
from adamfn.formats import Moments, with_mu_dtype
from adamfn.stages.moments import (
    bias_correct,
    scale_by_infinity_moments,
    scale_by_max_moments,
    scale_by_moments,
)
from adamfn.stages.rates import add_decayed_weights, scale_by_lr
from adamfn.stages.variants import (
    scale_by_lazy_moments,
    scale_by_nesterov_moments,
    scale_by_rectified_moments,
)
from adamfn.trees import Numeric


def _adam(
    b1: Any, b2: Any, eps: Any, eps_root: Any, nesterov: bool, moments: Moments, seed: Any
) -> list[GradientTransformation]:
    more: Any = {"eps_root": eps_root, "moments": moments, "seed": seed}
    return [scale_by_moments(b1, b2, eps, nesterov=nesterov, **more), bias_correct(b1, b2)]


@explained
def adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Adam, by Kingma and Ba (2015, arXiv 1412.6980, algorithm 1).

    At step t, with m and v from zero, $\hat m = m / (1 - b_1^t)$ and $\hat v = v / (1 - b_2^t)$:

    $$ m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
    u = -\alpha \frac{\hat m}{\sqrt{\hat v + \epsilon_\text{root}} + \epsilon} $$

    Updates have the gradients' shapes and dtypes. The state takes 8 bytes a parameter in float32.

    Args:
      learning_rate: $\alpha$, a number, a scalar array or a function of the steps taken so far.
      b1: decay of the gradients' average, in [0, 1); a number or a scalar array.
      b2: decay of the squares' average, likewise.
      eps: added to the root, at least 0, in units of the gradient.
      eps_root: added under the root.
      mu_dtype: optax's argument: with bfloat16, m is rounded to the nearest bfloat16 and v stays
        float32. None and float32 change nothing. `moments` stores both in fewer bytes.
      nesterov: look one step ahead, in Dozat's form (as optax's `nadam`).
      moments: how the moments are stored, as in `scale_by_moments`.
      seed: of the rounding of lean moments, likewise.

    >>> import adamfn, jax, jax.numpy as jnp
    >>> tx = adamfn.adam(learning_rate=0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    >>> updates, state = tx.update(grads, tx.init(params))
    >>> print(adamfn.apply_updates(params, updates)["w"].round(6))
    [ 0.9 -1.9]
    """
    stored = with_mu_dtype(moments, mu_dtype)
    return chain(*_adam(b1, b2, eps, eps_root, nesterov, stored, seed), scale_by_lr(learning_rate))


@explained
def scale_by_adam(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""`adam` without its learning rate, by optax's name: for chains of your own.

    $$ u = \hat m / (\sqrt{\hat v + \epsilon_\text{root}} + \epsilon) $$

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.scale_by_adam(), adamfn.scale_by_lr(0.1))
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0])
    [-0.1  0.1]
    """
    return chain(*_adam(b1, b2, eps, eps_root, nesterov, with_mu_dtype(moments, mu_dtype), seed))


@explained
def adamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-2,
    mask: Mask = None,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
    seed: Numeric | None = None,
    weight_decay_mask: Mask = None,
) -> GradientTransformation:
    r"""AdamW, by Loshchilov and Hutter (2019, arXiv 1711.05101): with decoupled weight decay.

    $$ u = -\alpha (\hat m / (\sqrt{\hat v + \epsilon_\text{root}} + \epsilon) + \lambda \theta) $$

    The learning rate multiplies the decay too, as in torch and optax. weight_decay, $\lambda$, and
    the mask of parameters that decay are as in `add_decayed_weights`; weight_decay_mask is another
    name for mask. `update` needs `params`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.adamw(learning_rate=0.1, weight_decay=0.5)
    >>> params = jnp.array([2.0])
    >>> print(tx.update(jnp.array([0.0]), tx.init(params), params)[0])
    [-0.1]
    """
    parts = _adam(b1, b2, eps, eps_root, nesterov, with_mu_dtype(moments, mu_dtype), seed)
    if mask is not None and weight_decay_mask is not None:
        raise TypeError("adamw: found both mask= and weight_decay_mask=; expected one of them.")
    decay = add_decayed_weights(weight_decay, weight_decay_mask if mask is None else mask)
    return chain(*parts, decay, scale_by_lr(learning_rate))


@explained
def amsgrad(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    *,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""AMSGrad, by Reddi et al. (2018, arXiv 1904.09237): its denominator never shrinks.

    $$ u = -\alpha \frac{\hat m}{\sqrt{v_\text{max} / (1 - b_2^t)} + \epsilon}, \qquad
    v_\text{max} \leftarrow \max(v_\text{max}, v) $$

    It is torch's `Adam(amsgrad=True)`; without bias_correction_mu and bias_correction_nu it is the
    paper's, with v and m as they are. The state takes 12 bytes a parameter.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.amsgrad(learning_rate=0.1)
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0])
    [-0.1  0.1]
    """
    moments, corrected = with_mu_dtype(moments, mu_dtype), bias_correction_nu
    ratio = scale_by_max_moments(
        b1, b2, eps, eps_root=eps_root, corrected=corrected, moments=moments, seed=seed
    )
    correction = bias_correct(b1 if bias_correction_mu else 0.0, b2 if corrected else 0.0)
    return chain(ratio, correction, scale_by_lr(learning_rate))


@explained
def nadam(
    learning_rate: ScalarOrSchedule = 2e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    momentum_decay: Numeric = 4e-3,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""NAdam, by Dozat (2016), as in torch: its momentum looks one step ahead, and warms up.

    $$ u = -\alpha\, \bar m / (\sqrt{\hat v + \epsilon_\text{root}} + \epsilon) $$

    $\bar m$, the average one step ahead, and momentum_decay are as in `scale_by_nesterov_moments`.
    With a constant momentum the recipe is `adam(nesterov=True)`, as `optax.nadam`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.nadam(learning_rate=0.25, b1=0.0)
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0].round(4))
    [-0.25  0.25]
    """
    moments = with_mu_dtype(moments, mu_dtype)
    ratio = scale_by_nesterov_moments(
        b1, b2, eps, eps_root=eps_root, momentum_decay=momentum_decay, moments=moments, seed=seed
    )
    return chain(ratio, bias_correct(0.0, b2), scale_by_lr(learning_rate))


@explained
def radam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    threshold: Numeric = 5.0,
    *,
    nesterov: bool = False,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""RAdam, by Liu et al. (2020, arXiv 1908.03265): a warmup while the denominator is uncertain.

    $$ u = -\alpha\, r\, \hat m \frac{\sqrt{1 - b_2^t}}{\sqrt v + \epsilon} \;\text{ if } \rho > 5,
    \qquad u = -\alpha\, \hat m \;\text{ otherwise} $$

    $\rho$, r, the threshold 5, eps and nesterov are as in `scale_by_rectified_moments`. The first
    steps (five with b2 = 0.999; all with b2 under 2/3) are momentum's, as large as the gradients.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.radam(learning_rate=0.25)
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0].round(4))
    [-0.75  1.25]
    """
    more: Any = {"eps_root": eps_root, "threshold": threshold, "moments": moments, "seed": seed}
    ratio = scale_by_rectified_moments(b1, b2, eps, nesterov=nesterov, **more)
    return chain(ratio, bias_correct(), scale_by_lr(learning_rate))


@explained
def adamax(
    learning_rate: ScalarOrSchedule = 2e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Adamax, by Kingma and Ba (as `adam`, algorithm 2): Adam in the infinity norm.

    $$ u = -\alpha\, \hat m / v, \qquad v \leftarrow \max(b_2 v,\; |g| + \epsilon) $$

    b2 is how much of the largest magnitude is left after a step. eps stands where torch has it.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.adamax(learning_rate=0.25)
    >>> print(tx.update(jnp.array([3.0, -5.0]), tx.init(jnp.zeros(2)))[0].round(4))
    [-0.25  0.25]
    """
    ratio = scale_by_infinity_moments(b1, b2, eps, moments=moments, seed=seed)
    return chain(ratio, bias_correct(b1, 0.0), scale_by_lr(learning_rate))


@explained
def lazy_adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    moments: Moments = "float32",
    seed: Numeric | None = None,
) -> GradientTransformation:
    r"""Adam for embeddings: rows whose gradient is all zero keep parameters and moments.

    $$ u = -\alpha\, \hat m \frac{\sqrt{1 - b_2^t}}{\sqrt v + \epsilon} \text{ in other rows} $$

    It does what torch.optim.SparseAdam does, for dense gradients. (Adam goes on moving a row by its
    old momentum after its token was last seen.) A weight decay in the chain moves all rows.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, g = adamfn.lazy_adam(learning_rate=0.1), jnp.array([[0.0, 0.0], [5.0, -5.0]])
    >>> print(adamfn.step(tx, g, tx.init(g), jnp.ones((2, 2)))[0].round(6))
    [[1.  1. ]
     [0.9 1.1]]
    """
    ratio = scale_by_lazy_moments(b1, b2, eps, eps_root=eps_root, moments=moments, seed=seed)
    return chain(ratio, bias_correct(b1, b2), scale_by_lr(learning_rate))
