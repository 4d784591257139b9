"""`observe`: what a training step did to every leaf."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamfn.interop.states import leaves_by_path
from adamfn.monitor.figures import Figures, measure
from adamfn.monitor.states import chain_states, count_of, rate_around, read
from adamfn.trees import PyTree, as_array, check_inexact, describe
from adamfn.varying import vary_together


class Observation(NamedTuple):
    """What was seen of a step. A tree of arrays: it goes through `jit` and `scan`."""

    step: jax.Array
    """The step's number, 1 at the first, int32; 0 where it was not looked at."""
    leaves: dict[str, Figures]
    """By a leaf's path, then by a figure's name: a float32 scalar, or a vector of one for each
    layer; 0 where it was not looked at."""


def observe(
    tx: Any,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    updates: PyTree,
    *,
    every: int = 1,
    when: chex.Numeric = True,
    layers: Mapping[str, int] | None = None,
    learning_rate: chex.Numeric | None = None,
) -> Observation:
    """What a training step did to every leaf, in a few scalars each.

    `adamfn.monitor.figures` defines them. A pure function, for inside a jitted step: it changes
    nothing of the training, gathers no leaf on a mesh, and takes almost no time in steps that it
    does not look at. Inside `jax.shard_map` the figures are those of a device's own shards.

    Args:
      tx: the transformation of ours. Inside optax's wrappers, the one that is wrapped; where a
        wrapper makes it, as `optax.inject_hyperparams(adamfn.adam)` does, one made with the same
        arguments.
      grads: the gradients, as `update` was given them; None where a leaf is not trained.
      state: the state after the step, of `tx` itself or of what it is wrapped in; of flax's
        optimizer `nnx.as_pure(optimizer.opt_state)`.
      params: the parameters before the step.
      updates: what is added to them: what `update`, or `step(..., return_updates=True)`, returned,
        or the parameters after the step less those before.
      every: looks at the first step and at each so many after it.
      when: looks only where this bool, a scalar, is true: `state.mini_step == 0` under
        `optax.MultiSteps`, whose other steps move nothing.
      layers: by the beginning of a path, the axis along which layers are stacked: `{"blocks": 0}`
        measures every layer of the leaves under `blocks` by itself.
      learning_rate: the rate of the step, where the state does not have it.

    Returns:
      An `Observation`. Figures that need a rate, or moments, are left out where there are none.

    Raises:
      TypeError: `tx` is not ours; a leaf is not an array of floating point.
      ValueError: a state of another chain, trees that do not match, layers along an axis that a
        leaf lacks; names the leaf.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1)
    >>> params = {"w": jnp.array([3.0, -3.0])}
    >>> grads = {"w": jnp.array([1.0, -2.0])}
    >>> updates, state = tx.update(grads, tx.init(params))
    >>> seen = monitor.observe(tx, grads, state, params, updates)
    >>> figures = seen.leaves["w"]
    >>> print(", ".join(f"{name} {figures[name]:.2f}" for name in ("weight", "update", "signal")))
    weight 3.00, update 0.10, signal 1.00
    """
    gs, us, ps = (
        _by_path(name, tree)
        for name, tree in (("grads", grads), ("updates", updates), ("params", params))
    )
    for path, g in gs.items():
        for name, tree in (("updates", us), ("params", ps)):
            if describe(tree.get(path)).split("[")[1:] != describe(g).split("[")[1:]:
                raise ValueError(
                    f"observe: {name} at {path or 'the root'}: found {describe(tree.get(path))};"
                    f" expected the shape of its gradient, {describe(g)}. Pass the parameters before"
                    " the step, and the updates of this step."
                )
    axes = _axes(gs, layers or {})
    nodes = chain_states(tx, state)
    count, around = count_of(tx, nodes[0]), rate_around(state)
    if not isinstance(every, int) or every < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"observe: every is {every!r}; expected a number of steps, at least 1.")

    def look(_: None) -> dict[str, Figures]:
        chains = [read(tx, node, gs) for node in nodes]  # here, lest every step unpack
        found: dict[str, Figures] = {}
        for path, g in gs.items():
            own = next((chain for chain in chains if path in chain.moments), chains[0])
            rates = (learning_rate, own.rate, around)
            rate = next((rate for rate in rates if rate is not None), None)
            moments = own.moments.get(path)
            found[path] = measure(g, us[path], ps[path], moments, rate, axes.get(path))
        values, treedef = jax.tree.flatten(found)
        return treedef.unflatten(vary_together([*values, *jax.tree.leaves(gs)])[: len(values)])

    def pass_by(_: None) -> dict[str, Figures]:
        values, treedef = jax.tree.flatten(jax.eval_shape(look, None))
        zeros = [jnp.zeros(value.shape, value.dtype) for value in values]
        return treedef.unflatten(vary_together([*zeros, *jax.tree.leaves(gs)])[: len(zeros)])

    due = ((count - 1) % every == 0) & jnp.asarray(when, bool)
    return Observation(jnp.where(due, count, 0), jax.lax.cond(due, look, pass_by, None))


def _by_path(name: str, tree: PyTree) -> dict[str, Any]:
    check_inexact(tree, f"observe: {name}")
    leaves = leaves_by_path(tree)
    return {path: as_array(leaf) for path, leaf in leaves.items() if leaf is not None}


def _axes(leaves: Mapping[str, Any], layers: Mapping[str, int]) -> dict[str, int]:
    """The axis of the layers of each leaf that has some."""
    axes: dict[str, int] = {}
    for start, axis in layers.items():
        under = [path for path in leaves if path == start or path.startswith(f"{start}/")]
        if not under:
            raise ValueError(
                f"observe: layers has {start!r}, where no leaf is; expected the beginning of a path:"
                f" {', '.join(leaves)}."
            )
        for path in under:
            rank = leaves[path].ndim
            if not -rank <= axis < rank:
                raise ValueError(
                    f"observe: layers has the axis {axis} for {path}, which is"
                    f" {describe(leaves[path])}; expected one from {-rank} to {rank - 1}."
                )
            axes[path] = axis % rank
    return axes
