# SPDX-License-Identifier: Apache-2.0
"""`step`: one training update, from gradients to the next parameters."""

from collections.abc import Mapping
from typing import Any

import jax

from adamfn.chains.chain import chain_of
from adamfn.chains.leaves import Request, check_call
from adamfn.chains.transform import (
    Transformation,
    apply_updates,
    check_transformation,
    merged,
    where_updated,
)
from adamfn.trees import PyTree, shown


def step(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree = None,
    *,
    return_updates: bool = False,
    **extra: Any,
) -> Any:
    """One training update, from gradients to the next parameters.

    A chain that ends in stages of ours moves the parameters in the same pass over memory as the
    moments, on CPU in native code. With any other, this is `update`, then `apply_updates`.

    Args:
      tx: any transformation, ours or optax's.
      grads: the gradients; None where a leaf is not trained.
      state: the transformation's state. Donate it and the parameters to the jitted function that
        this is called in, and return them in the order in which that function takes them: they
        are then written in place. (JAX pairs donated arrays of one shape with results by order;
        `(state, params)` against `(params, state)` costs a copy of each.)
      params: any pytree, such as an Equinox module.
      return_updates: whether to return the updates too, after the next parameters and state.
      **extra: what `update` takes besides, such as `learning_rate=`.

    Returns:
      The next parameters, of their dtypes and shapes, and the next state.

    Raises:
      TypeError, ValueError: as `tx.update` and `apply_updates`; an argument in `extra` that no part
        of the chain takes.

    >>> from functools import partial
    >>> import adamfn, jax, jax.numpy as jnp
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> @partial(jax.jit, donate_argnums=(0, 1))
    ... def train_step(params, state):
    ...     grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    ...     return adamfn.step(tx, grads, state, params)
    >>> params, state = train_step(params, state)
    >>> print(params["w"].round(6))
    [ 0.9 -1.9]
    """
    check_transformation("step(tx, grads, state, params): tx", tx)
    if params is None and jax.tree.leaves(grads):
        raise TypeError("step: found no params; expected step(tx, grads, state, params).")
    check_call("step(tx, grads, state, params)", grads, state, params)
    check_extra(tx, extra, "step")
    chain, trained = chain_of(tx), where_updated(params, grads)
    if chain is None:
        updates, state = tx.update(grads, state, trained, **extra)
        params = apply_updates(params, updates)
    else:
        request = Request(trained, extra, updates=return_updates, moves=True)
        updates, moved, state = chain.advance(grads, state, request)
        params = merged(params, moved)
    return (params, state, updates) if return_updates else (params, state)


def check_extra(tx: Transformation, extra: Mapping[str, Any], name: str) -> None:
    """Raises TypeError if no part of a chain of ours takes an extra argument of the caller `name`.

    Of a transformation that is not ours nothing is known.
    """
    chain = chain_of(tx)
    takes = chain and chain.takes
    for argument, value in extra.items():
        if takes is not None and argument not in takes:
            known = ", ".join(f"{taken}=" for taken in sorted(takes)) or "none"
            raise TypeError(
                f"{name}: found the argument {argument}={shown(value)}, which no part of the chain"
                f" takes; expected {known}."
            )
