"""`clip_by_global_norm`, and the norm of all gradients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.transform import GradientTransformation
from adamfn.core.formulas import multiply
from adamfn.core.hyperparameters import ScalarOrSchedule, scheduled, value_at
from adamfn.core.stage import Scalars, Stage, exported_state
from adamfn.trees import wide_dtype


@exported_state
class ClipByGlobalNormState(NamedTuple):
    """State of `clip_by_global_norm`."""

    grad_norm: chex.Array
    """The norm of the last step's gradients, to be logged."""


def clip_by_global_norm(max_norm: ScalarOrSchedule) -> GradientTransformation:
    r"""Scales all gradients down if their norm, taken over all of them, exceeds a bound.

    $$ g \leftarrow g \min(1, r / \lVert g \rVert), \qquad
    \lVert g \rVert^2 = \textstyle\sum |g_i|^2 $$

    The bound max_norm, r, is a number at least 0, a scalar array, or a function of the count. The
    norm takes one pass over the gradients, in float32 at least; the factor is a scalar of the fused
    run after it, and costs no other pass. It must be the first stage of a chain.
    `update(..., grad_norm=x)` takes x for the norm. Inside `jax.shard_map`, where gradients are
    shards, x is the root of the `jax.lax.psum` of their squares' sums. Source: Pascanu, Mikolov and
    Bengio, On the Difficulty of Training Recurrent Neural Networks, 2013, algorithm 1
    (arXiv 1211.5063); as `optax.clip_by_global_norm`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.scale_by_lr(1.0))
    >>> grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> updates, state = tx.update(grads, tx.init(grads))
    >>> print(updates["a"], updates["b"], state[0].grad_norm)
    [-0.6] [-0.8] 5.0
    """
    configured = scheduled("max_norm", max_norm)

    def scalars(count: jax.Array, state: Any, extra: Mapping[str, Any]) -> Scalars:
        norm, bound = grad_norm_in(extra), value_at("max_norm", configured, count - 1)
        within = norm <= bound  # of NaN neither: the factor is NaN, as optax's
        return (jnp.where(within, 1, bound / jnp.where(within, 1, norm)),), {"grad_norm": norm}

    start, takes = {"grad_norm": lambda: jnp.zeros((), float)}, ("grads", "grad_norm")
    name, state = "clip_by_global_norm", ClipByGlobalNormState
    stage = Stage(name, multiply, scalars=scalars, start=start, state=state, takes=takes)
    return from_stage(stage)


def grad_norm_in(extra: Mapping[str, Any]) -> jax.Array:
    """The norm of all gradients: the extra argument `grad_norm`, or else computed."""
    given = extra.get("grad_norm")
    return _global_norm(extra["grads"]) if given is None else jnp.asarray(given)


@jax.jit
def _global_norm(grads: Sequence[jax.Array]) -> jax.Array:
    wide = [g.astype(wide_dtype(g.dtype)) for g in grads]
    squares = [jnp.sum(jnp.real(g * jnp.conj(g))) for g in wide]
    return jnp.sqrt(sum(squares, start=jnp.zeros((), jnp.float32)))
