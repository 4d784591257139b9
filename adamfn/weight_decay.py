"""`add_decayed_weights`: weight decay, decoupled or not by where it stands in the chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamfn.ema import increment
from adamfn.hyperparams import ScalarOrSchedule, scheduled, value_at
from adamfn.state import check_state
from adamfn.transform import GradientTransformation
from adamfn.trees import PyTree, map_leaves


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights`."""

    count: chex.Array
    """Steps taken: int32 scalar."""


def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> GradientTransformation:
    r"""Adds a multiple of the parameters to the updates.

    $$ u \leftarrow u + \lambda \theta $$

    Just before `scale_by_lr` it is AdamW's decoupled decay, which shrinks parameters by
    $\alpha\lambda$ a step; before `scale_by_moments` it is an L2 penalty, as in torch's
    `Adam(weight_decay=...)`.

    Args:
      weight_decay: a number at least 0, a scalar array, or a function of the number of steps
        taken so far, such as any optax schedule.
      mask: which parameters decay, None for all: a tree of bools of the parameters' structure or
        a prefix of it, or a function that makes one from the parameters.

    Returns:
      A `GradientTransformation` that keeps structure, shapes and dtypes. Its `update` needs
      `params`.

    Raises:
      TypeError, ValueError: a decay that is none; at `update`, `params` missing or unlike the
        updates, a mask that does not fit, a state of another transformation.

    References:
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2
      (arXiv 1711.05101).

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.add_decayed_weights(0.5, mask=lambda p: {"w": True, "b": False})
    >>> params = {"w": jnp.array([2.0]), "b": jnp.array([2.0])}
    >>> updates, state = tx.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, tx.init(params), params)
    >>> print(updates["w"], updates["b"])
    [1.] [0.]
    """
    configured = scheduled("weight_decay", weight_decay)

    def init(params: PyTree) -> AddDecayedWeightsState:
        return AddDecayedWeightsState(count=jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, AddDecayedWeightsState]:
        state = check_state("add_decayed_weights", state, AddDecayedWeightsState)
        if params is None and updates is not None:
            raise ValueError(
                "add_decayed_weights: update got no params, and decay needs them. Call"
                " update(updates, state, params)."
            )
        rate = value_at("weight_decay", configured, state.count)
        decayed, *_ = map_leaves(
            _add_multiple,
            {"updates": updates, "params": params},
            (rate,),
            caller="add_decayed_weights",
            way_out="Pass the parameters that the gradients are of.",
        )
        if mask is not None:
            chosen = broadcast_mask(mask, params)
            decayed = jax.tree.map(lambda yes, d, u: d if yes else u, chosen, decayed, updates)
        return decayed, AddDecayedWeightsState(increment(state.count))

    return GradientTransformation(init, update)


def _add_multiple(u: jax.Array, p: jax.Array, rate: jax.Array) -> tuple[jax.Array]:
    return (u + rate * p,)


def broadcast_mask(mask: PyTree | Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """A mask as a tree of bools with the parameters' structure.

    Raises:
      TypeError, ValueError: it has something else than bools, or does not fit the parameters.
    """
    # A function is a leaf; a module that can be called is a tree (optax issue 1007).
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    for path, leaf in jax.tree.leaves_with_path(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"add_decayed_weights: the mask at {jax.tree_util.keystr(path) or 'the root'} is"
                f" {leaf!r}; expected True or False, known when the step is traced."
            )
    try:
        return jax.tree.broadcast(mask, params)
    except ValueError as error:
        raise ValueError(
            "add_decayed_weights: the mask's structure is not that of the parameters, nor a prefix"
            f" of it: found {jax.tree.structure(mask)}, expected {jax.tree.structure(params)}."
        ) from error
