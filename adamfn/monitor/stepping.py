"""`step`: a training step that is looked at on its way."""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from adamfn.chains import step as stepping
from adamfn.chains.transform import Transformation
from adamfn.monitor.observing import observe
from adamfn.trees import PyTree


def step(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    ours: Transformation | None = None,
    every: int = 1,
    when: chex.Numeric = True,
    layers: Mapping[str, int] | None = None,
    return_updates: bool = False,
    **extra: Any,
) -> Any:
    """`observe` and then `adamfn.step`, which waits for it.

    By themselves the two are in no order, and what `step` would write in place is copied first,
    whether a look is taken or not. Here nothing is copied.

    Args:
      tx: as `observe` takes it, and so are the others.
      grads: the gradients; None where a leaf is not trained.
      state: the state, to be donated with the parameters.
      params: the parameters.
      ours: the transformation of ours inside one of optax's.
      every: looks at the first step and at each so many after it.
      when: looks only where this bool, a scalar, is true.
      layers: by the beginning of a path, the axis along which layers are stacked.
      return_updates: whether to return the updates too, as `adamfn.step` does.
      **extra: what `update` takes besides, such as `learning_rate=`.

    Returns:
      The next parameters, the next state, with `return_updates` the updates, and the
      `Observation`.

    Raises:
      TypeError, ValueError: as `observe` and `adamfn.step`.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.array([3.0, -3.0])}
    >>> params, state, seen = monitor.step(tx, params, tx.init(params), params)
    >>> print(f"{params['w'][0]:.1f}", seen.leaves["w"]["weight"])
    2.9 3.0
    """
    seen = observe(
        tx, grads, state, params, ours=ours, every=every, when=when, layers=layers, **extra
    )
    # 0, as no number of a step is negative; but XLA does not know, and keeps the two in order. An
    # optimization barrier it takes away before it decides what to copy.
    nothing = jnp.where(seen.step < 0, 1, 0).astype(jnp.int32)
    state = jax.tree.map(lambda x: x + nothing if _is_count(x) else x, state)
    moved = stepping.step(tx, grads, state, params, return_updates=return_updates, **extra)
    return *moved, seen


def _is_count(x: Any) -> bool:
    """Whether an array of a state may be its count, which every leaf's program reads."""
    return jnp.shape(x) == () and jnp.result_type(x) == jnp.int32
