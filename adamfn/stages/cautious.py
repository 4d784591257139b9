"""`cautious_updates`: no step against the gradient of the moment."""

from collections.abc import Callable

import chex
import jax.numpy as jnp

from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import where_agreeing, where_agreeing_by_layer
from adamfn.core.hyperparameters import scalar
from adamfn.core.stage import Stage
from adamfn.stages.layers import by_layer
from adamfn.trees import PyTree


def cautious_updates(
    floor: chex.Numeric = 1e-3,
    *,
    stacked: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    r"""Lets an update through where its sign is the gradient's, and scales it up for the rest.

    With the share s of the elements of a leaf whose update agrees with their gradient:

    $$
    u \leftarrow \frac{\mathbb 1(u g > 0)\, u}{\max(s, s_\text{min})}, \qquad
    s = \operatorname{mean} \mathbb 1(u g > 0)
    $$

    After `bias_correct` and before the decay and `scale_by_lr`, which turns signs around, it makes
    AdamW the paper's C-AdamW.

    Args:
      floor: $s_\text{min}$, the least share that is divided by, at least 0.
      stacked: which leaves hold layers along their first axis, each with a share of its own: a tree
        of bools of the parameters' structure or a prefix of it, or a function that makes one from
        the parameters, such as `adamfn.masks.named("layers")`. None for none.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. g is the gradient that the
      stages of ours joined with it are given. Inside `jax.shard_map` the share is that of a shard.

    Raises:
      TypeError, ValueError: a floor out of range; at `update`, `stacked` does not fit.

    References:
      Liang et al., Cautious Optimizers: Improving Training with One Line of Code, 2024, algorithms
      1 and 2 (arXiv 2411.16085), which divide by s + eps, or by s + 1/n for n elements; the floor
      is of timm and of the authors' later code. Complex numbers agree here whose angle is less than
      a right one.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.scale_by_moments(b1=0.9, b2=0.0), adamfn.cautious_updates())
    >>> state = tx.init(jnp.zeros(2))
    >>> for g in ([1.0, 1.0], [1.0, -0.1]):
    ...     updates, state = tx.update(jnp.array(g), state)
    >>> print(updates.round(2))  # the second still points the old way
    [0.38 0.  ]
    """
    floor = scalar("floor", floor)
    stage = Stage(
        "cautious_updates",
        where_agreeing,
        reads=("grads",),
        scalars=lambda count, state, extra: ((jnp.asarray(floor, float),), {}),
        elementwise=False,
    )
    return by_layer(stage, where_agreeing_by_layer, stacked)
