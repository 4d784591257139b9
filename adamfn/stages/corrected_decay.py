"""`add_corrected_decay`: a decay that keeps its balance with the update while the rate falls."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import add_multiple
from adamfn.core.hyperparameters import ScalarOrSchedule, scalar, scheduled, value_at
from adamfn.core.stage import Scalars, Stage
from adamfn.trees import PyTree


def add_corrected_decay(
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    peak: chex.Numeric,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters that falls with the learning rate: AdamC's decay.

    With the rate $\alpha_t$ of this step and the largest of the run:

    $$ u \leftarrow u + \lambda \frac{\alpha_t}{\alpha_\text{max}} \theta $$

    Before `scale_by_lr` with the same rate this shrinks parameters by
    $\lambda \alpha_t^2 / \alpha_\text{max}$. The size of weights whose scale a normalization
    takes out settles where update and decay are in balance, at $\sqrt{\alpha / \lambda}$ with
    AdamW; as the rate falls, their gradients grow. With this decay the balance stays.

    Args:
      weight_decay: $\lambda$, as in `add_decayed_weights`.
      learning_rate: what `scale_by_lr` has: a number, a scalar array or a function of the count.
        `update(..., learning_rate=x)` wins over it here as there.
      peak: $\alpha_\text{max}$, the largest rate of the schedule, above 0.
      mask: which parameters decay, as in `add_decayed_weights`. In the paper those of normalized
        layers decay so, and the output layer, if it is not one, as in AdamW: an
        `add_decayed_weights` with a mask of the others.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its `update` needs
      `params`.

    Raises:
      TypeError, ValueError: as `add_decayed_weights`; a peak that is 0.

    References:
      Defazio, Why Gradients Rapidly Increase Near the End of Training, 2025, algorithm 2
      (arXiv 2506.02285). timm's `corrected_weight_decay` decays all parameters so, and takes the
      rate that the optimizer was made with for the peak.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.add_corrected_decay(0.5, lambda count: 0.1 / (1 + count), peak=0.1)
    >>> params = jnp.array([2.0])
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.zeros(1), state, params)
    ...     print(updates)
    [1.]
    [0.5]
    """
    decay, rate = scheduled("weight_decay", weight_decay), scheduled("learning_rate", learning_rate)
    peak = scalar("peak", peak)
    if isinstance(peak, float) and not peak:
        raise ValueError("peak is 0; expected the largest rate of the schedule, above 0.")

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        given = extra.get("learning_rate")
        chosen = rate if given is None else scheduled("learning_rate", given)
        share = value_at("learning_rate", chosen, count - 1) / peak
        return (value_at("weight_decay", decay, count - 1) * share,), {}

    return from_stage(
        Stage(
            "add_corrected_decay",
            add_multiple,
            reads=("params",),
            scalars=scalars,
            takes=("learning_rate",),
            mask=mask,
        )
    )
