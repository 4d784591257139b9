# SPDX-License-Identifier: Apache-2.0
"""An average of the weights over the steps, as the last stage of a chain."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains.chain import from_stage
from adamfn.chains.leaves import kept_by_path
from adamfn.chains.transform import GradientTransformation
from adamfn.core import averages, formulas
from adamfn.core.stage import Scalars, Stage, exported_state
from adamfn.trees import Numeric, PyTree, wide_dtype


@exported_state
class AverageWeightsState(NamedTuple):
    """State of `average_weights`."""

    count: jax.Array
    """Steps taken: int32 scalar."""
    average: PyTree
    """In the parameters' tree and shapes, float32 at least; before the first step, the weights."""


def average_weights(decay: Numeric = 0.999) -> GradientTransformation:
    r"""Keeps an exponential moving average of the weights: the last stage of a chain.

    With the weights $\theta$ after this step, as they are rounded, at step t:

    $$ a \leftarrow a + \frac{1 - d}{1 - d^t} (\theta - a) $$

    This is the average from zero, corrected for its beginning as in Adam: after one step it is the
    weights. decay, d, is a number in [0, 1) or a scalar array. Updates pass unchanged. `update`
    needs `params`, and `apply_updates` comes after it. After `round_weights`, $\theta$ has the
    bits that bfloat16 cannot hold. Evaluate the parameters that `averaged_weights` returns. Source:
    Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992, with Adam's
    weights (Kingma and Ba, section 7.2).

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.chain(adamfn.adam(0.5), adamfn.average_weights(0.5)), jnp.zeros(1)
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     params, state = adamfn.step(tx, jnp.ones(1), state, params)
    >>> print(adamfn.averaged_weights(params, state).round(4))  # of -0.5 and -1
    [-0.8333]
    """
    average = averages.decay("decay", decay)

    def scalars(count: jax.Array, *_: Any) -> Scalars:
        return (average.complement / average.bias(count),), {}

    keeps = {"average": lambda leaf: jnp.array(leaf, wide_dtype(jnp.result_type(leaf)))}
    name, formula, state = "average_weights", formulas.average_of_new, AverageWeightsState
    return from_stage(Stage(name, formula, ("new_params",), keeps, scalars=scalars, state=state))


def averaged_weights(params: PyTree, state: PyTree) -> PyTree:
    """The average of the weights that `average_weights` keeps, with the parameters' dtypes.

    The state is that of a chain with it, in wrappers or not. Leaves that no such stage has seen,
    as frozen ones, are returned as they are. For the average of bfloat16 weights in float32, pass
    `whole_weights(params, state)` as the parameters.

    >>> import adamfn, jax.numpy as jnp
    >>> params = {"w": jnp.ones(2)}
    >>> tx = adamfn.chain(adamfn.adam(), adamfn.average_weights())
    >>> print(adamfn.averaged_weights(params, tx.init(params))["w"])
    [1. 1.]
    """
    found, (leaves, treedef) = kept_by_path("average", state), jax.tree.flatten_with_path(params)
    paths = {path for path, _ in leaves}
    if (paths and not paths & {*found}) or any(
        path in found and found[path].shape != jnp.shape(p) for path, p in leaves
    ):
        raise ValueError(
            "averaged_weights: the state has no average of these parameters and their shapes;"
            " expected that of a chain with average_weights. Of a packed chain, pass"
            " adamfn.repack(tx, state, params)."
        )
    return treedef.unflatten(
        [found[path].astype(jnp.result_type(p)) if path in found else p for path, p in leaves]
    )
