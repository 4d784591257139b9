"""`clip_by_global_norm`: gradients no longer than a bound, all together."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import multiply
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled, value_at
from adamfn.core.stage import Scalars, Stage, exported_state
from adamfn.stages.norms import grad_norm_in


@exported_state
class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    grad_norm: chex.Array
    """The norm of the last step's gradients, to be logged."""


def clip_by_global_norm(max_norm: ScalarOrSchedule) -> GradientTransformation:
    r"""Scales gradients down where the norm of all of them together exceeds a bound.

    $$ g \leftarrow g \min(1, r / \lVert g \rVert), \qquad
    \lVert g \rVert^2 = \textstyle\sum |g_i|^2 $$

    The norm takes one pass over the gradients, in float32 at least. Its factor is a scalar of the
    program that goes on with them, and costs none.

    Args:
      max_norm: r, a number at least 0, a scalar array, or a function of the count.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. It comes first of the
      stages of a chain. `update(..., grad_norm=x)` takes x for the norm: inside `jax.shard_map`,
      where gradients are shards, the root of what `jax.lax.psum` makes of the shards' squares.

    Raises:
      TypeError, ValueError: not a bound; at `chain`, a stage of ours stands before it.

    References:
      Pascanu, Mikolov and Bengio, On the Difficulty of Training Recurrent Neural Networks, 2013,
      algorithm 1 (arXiv 1211.5063); as `optax.clip_by_global_norm`.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.scale_by_lr(1.0))
    >>> params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> updates, state = tx.update(grads, tx.init(params))
    >>> print(updates["a"], updates["b"], state[0].grad_norm)
    [-0.6] [-0.8] 5.0
    """
    configured = scheduled("max_norm", max_norm)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        norm = grad_norm_in(extra)
        bound = value_at("max_norm", configured, count - 1)
        short = norm < bound
        factor = jnp.where(short, 1, bound / jnp.where(short, 1, norm))
        return (factor,), {"grad_norm": norm}

    return from_stage(
        Stage(
            "clip_by_global_norm",
            multiply,
            scalars=scalars,
            start={"grad_norm": lambda: jnp.zeros((), float)},
            state=ClipByGlobalNormState,
            takes=("grads", "grad_norm"),
        )
    )
