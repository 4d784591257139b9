"""`clip_updates`: smaller steps of a leaf whose gradients have outgrown their average."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.transform import GradientTransformation
from adamfn.core.averages import bias, decay
from adamfn.core.formulas import clip_outgrown, clip_outgrown_by_layer
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import Scalars, Stage
from adamfn.stages.layers import by_layer
from adamfn.trees import PyTree


def clip_updates(
    b2: chex.Numeric = 0.999,
    eps: chex.Numeric = 1e-8,
    *,
    stacked: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    r"""Divides the updates of a leaf by how far its gradients have outgrown their average squares.

    With v of the stage of moments before it, after this step, and $\hat v = v / (1 - b_2^t)$:

    $$
    u \leftarrow \frac{u}{\max(1, R)}, \qquad
    R = \sqrt{\operatorname{mean} \frac{g^2}{\max(\hat v, \epsilon^2)}}
    $$

    the mean being over the leaf. Just before `scale_by_lr`, with b2 of 0.99 and eps of 1e-6 in all
    stages, it makes AdamW the paper's StableAdamW, whose decay shrinks likewise; before
    `add_decayed_weights` it leaves the decay alone.

    Args:
      b2: the decay of the squares' average, as `scale_by_moments` has it.
      eps: likewise, at least 0.
      stacked: which leaves hold layers along their first axis, each with an R of its own, as in
        `cautious_updates`.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. g is the gradient that the
      stages of ours joined with it are given. Inside `jax.shard_map` R is that of a shard.

    Raises:
      TypeError, ValueError: a hyperparameter out of range; at `update`, no stage of moments is
        joined with it, or `stacked` does not fit.

    References:
      Wortsman et al., Stable and Low-Precision Training for Large-Scale Vision-Language Models,
      2023, algorithm 2 (arXiv 2304.13013); Shazeer and Stern, Adafactor, 2018, section 6.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(
    ...     adamfn.scale_by_moments(b1=0.0), adamfn.bias_correct(b1=0.0), adamfn.clip_updates()
    ... )
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, -1.0], [9.0, -9.0]):  # the second is 1.41 times the root of its average
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> print(updates.round(2))
    [ 1. -1.]
    """
    square, eps = decay("b2", b2), scalar("eps", eps)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        c2 = bias(square, count)
        least = jnp.maximum(c2 * eps * eps, jnp.finfo(jnp.float32).tiny)
        return (jnp.sqrt(c2), least), {}

    stage = Stage(
        "clip_updates", clip_outgrown, ("grads", "nu"), scalars=scalars, elementwise=False
    )
    return by_layer(stage, clip_outgrown_by_layer, stacked)
