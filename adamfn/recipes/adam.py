"""Adam and AdamW: chains that read as their formulas."""

from collections.abc import Callable

import chex

from adamfn.chains.chain import chain
from adamfn.chains.transform import GradientTransformation
from adamfn.core.hyperparameters import ScalarOrSchedule
from adamfn.core.naming import explained
from adamfn.formats import Moments
from adamfn.stages.bias import bias_correct
from adamfn.stages.learning_rate import scale_by_lr
from adamfn.stages.ratio import scale_by_moments
from adamfn.stages.weight_decay import add_decayed_weights
from adamfn.trees import PyTree


@explained
def adam(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    nesterov: bool = False,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""Adam, by Kingma and Ba.

    At step $t = 1, 2, \ldots$, with m and v from zero:

    $$
    m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
    u = -\alpha \frac{m / (1 - b_1^t)}{\sqrt{v / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}
    $$

    Args:
      learning_rate: a number, a scalar array, or a function of the number of steps taken so far;
        `update(..., learning_rate=x)` wins over it.
      b1: decay of the gradients' average, in [0, 1).
      b2: decay of the squares' average, in [0, 1).
      eps: added to the root, in units of the gradient.
      eps_root: added under the root; not 0, updates can be differentiated at zero gradients.
      nesterov: look one step ahead, in Dozat's form (as optax's `nadam`).
      moments: how the moments are stored, as in `scale_by_moments`.

    Returns:
      A `GradientTransformation`. Updates have the gradients' shapes and dtypes, and go to
      `apply_updates(params, updates)`. The state takes 8 bytes a parameter, two float32
      moments, or what `moments` makes of them.

    Raises:
      TypeError, ValueError: a hyperparameter out of range; at `init` and `update`, trees that do
        not fit: the message names the leaf.

    References:
      Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015, algorithm 1
      (arXiv 1412.6980); Dozat, Incorporating Nesterov Momentum into Adam, 2016.

    >>> import adamfn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> tx = adamfn.adam(learning_rate=0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    ...     updates, state = tx.update(grads, state)
    ...     params = adamfn.apply_updates(params, updates)
    >>> print(jnp.abs(params["w"]) < 0.1)
    [ True  True]
    """
    return chain(
        scale_by_moments(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, moments=moments),
        bias_correct(b1, b2),
        scale_by_lr(learning_rate),
    )


@explained
def adamw(
    learning_rate: ScalarOrSchedule = 1e-3,
    b1: chex.Numeric = 0.9,
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    eps_root: chex.Numeric = 0.0,
    weight_decay: ScalarOrSchedule = 1e-2,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    nesterov: bool = False,
    moments: Moments = "float32",
) -> GradientTransformation:
    r"""AdamW: Adam with decoupled weight decay, by Loshchilov and Hutter.

    With $\hat m$ and $\hat v$ as in `adam`:

    $$
    u = -\alpha \Big(
      \frac{\hat m}{\sqrt{\hat v + \epsilon_\text{root}} + \epsilon} + \lambda \theta
    \Big)
    $$

    Args:
      learning_rate: as in `adam`. It multiplies the decay too, as in torch and optax.
      b1: as in `adam`.
      b2: as in `adam`.
      eps: as in `adam`.
      eps_root: as in `adam`.
      weight_decay: a number, a scalar array, or a function of the number of steps taken so far.
      mask: which parameters decay, None for all: a tree of bools, a prefix of one, or a function
        that makes one from the parameters.
      nesterov: as in `adam`.
      moments: as in `adam`.

    Returns:
      A `GradientTransformation`, whose `update` needs `params`.

    Raises:
      TypeError, ValueError: as `adam`; and at `update`, for missing `params` and a mask that does
        not fit.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2
      (arXiv 1711.05101).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.adamw(learning_rate=0.1, weight_decay=0.5)
    >>> params = jnp.array([2.0])
    >>> updates, state = tx.update(jnp.array([0.0]), tx.init(params), params)
    >>> print(updates)
    [-0.1]
    """
    return chain(
        scale_by_moments(b1, b2, eps, eps_root=eps_root, nesterov=nesterov, moments=moments),
        bias_correct(b1, b2),
        add_decayed_weights(weight_decay, mask),
        scale_by_lr(learning_rate),
    )
