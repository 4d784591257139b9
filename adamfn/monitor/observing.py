"""`observe`: what a training step does to every leaf."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamfn.chains.step import check_extra
from adamfn.chains.transform import Transformation, apply_updates, where_updated
from adamfn.core.averages import increment
from adamfn.core.varying import vary_together
from adamfn.interop.states import leaves_by_path
from adamfn.monitor.figures import Figures, measure
from adamfn.monitor.states import chain_states, count_of, rate_around, read
from adamfn.stages.round_weights import rounding_states, whole_weights
from adamfn.trees import PyTree, as_array, check_inexact, describe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What was seen of a step. A tree of two arrays: it goes through `jit` and `scan`."""

    step: jax.Array
    """The step's number, 1 at the first, int32; 0 where it was not looked at."""
    values: jax.Array
    """All figures end to end, float32; 0 where it was not looked at. In one array, since each that
    a branch returns and a loop stacks costs about as much as measuring a small leaf."""
    places: tuple[tuple[str, str, int | None], ...] = field(metadata={"static": True})
    """The leaf's path and the name of each figure, and how many layers it is of, if of layers."""

    @property
    def leaves(self) -> dict[str, Figures]:
        """By a leaf's path, then by a figure's name: a scalar, or a vector of one for each layer.

        What `scan` or `vmap` put before their axes stays there.
        """
        found: dict[str, Figures] = {}
        start = 0
        for path, name, layers in self.places:
            end = start + (1 if layers is None else layers)
            where = start if layers is None else slice(start, end)
            found.setdefault(path, {})[name] = self.values[..., where]
            start = end
        return found


def observe(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    ours: Transformation | None = None,
    every: int = 1,
    when: chex.Numeric = True,
    layers: Mapping[str, int] | None = None,
    **extra: Any,
) -> Observation:
    """What the training step that is about to be taken does to every leaf, in a few scalars each.

    `adamfn.monitor.figures` defines them. A pure function, for inside a jitted step, before
    `update` or `step`; `monitor.step` is both, and copies less. When it looks, it takes `tx.update`
    once more by itself, so that the program of the training stays as it is. On a mesh it gathers no
    leaf. Inside `jax.shard_map` the figures are those of a device's own shards.

    Args:
      tx: the transformation that the step is taken with.
      grads: the gradients; None where a leaf is not trained.
      state: the state before the step; of flax's optimizer `nnx.as_pure(optimizer.opt_state)`.
      params: the parameters before the step.
      ours: where `tx` is optax's, the transformation of ours that is inside; where optax makes it,
        as `optax.inject_hyperparams(adamfn.adam)` does, one made with the same arguments.
      every: looks at the first step and at each so many after it.
      when: looks only where this bool, a scalar, is true: `optax.MultiSteps(tx, k)` moves nothing
        before `state.mini_step == k - 1`.
      layers: by the beginning of a path, the axis along which layers are stacked: `{"blocks": 0}`
        measures every layer of the leaves under `blocks` by itself.
      **extra: what `update` takes besides, such as `learning_rate=`.

    Returns:
      An `Observation`. Figures that need a rate, or moments, are left out where there are none.

    Raises:
      TypeError: neither `tx` nor `ours` is ours; a leaf is not an array of floating point; `when`
        or `layers` is something else; an argument in `extra` that no part of the chain takes.
      ValueError: a state of another chain, trees that do not match, layers along an axis that a
        leaf lacks; names the leaf. `every` is not a number of steps.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn import monitor
    >>> tx = adamfn.adam(0.1)
    >>> params, grads = {"w": jnp.array([3.0, -3.0])}, {"w": jnp.array([1.0, -2.0])}
    >>> seen = monitor.observe(tx, grads, tx.init(params), params)
    >>> figures = seen.leaves["w"]
    >>> print(", ".join(f"{name} {figures[name]:.2f}" for name in ("weight", "update", "signal")))
    weight 3.00, update 0.10, signal 1.00
    """
    check_extra(tx, extra, "observe")
    if not _is_integer(every) or every < 1:
        raise ValueError(f"observe: every is {every!r}; expected a number of steps, at least 1.")
    if not (isinstance(when, bool) or (hasattr(when, "dtype") and describe(when) == "bool[]")):
        raise TypeError(f"observe: when is {describe(when)}; expected True, False or bool[].")
    params = where_updated(params, grads)
    gs, ps = _by_path("grads", grads), _by_path("params", params)
    for path, g in gs.items():
        if path not in ps or ps[path].shape != g.shape:
            raise ValueError(
                f"observe: params at {path or 'the root'}: found {describe(ps.get(path))}; expected"
                f" the shape of its gradient, {describe(g)}. Pass the parameters before the step."
            )
    axes = _axes(gs, {} if layers is None else layers)
    name, ours = ("tx", tx) if ours is None else ("ours", ours)
    count = count_of(ours, chain_states(ours, state, name)[0])

    def look() -> dict[str, Figures]:
        updates, after = tx.update(grads, state, params, **extra)
        us, weights = _by_path("updates", updates), ps
        if rounding_states(after):  # what moves are the weights that these stand for
            moved = whole_weights(apply_updates(params, updates), after)
            weights = _by_path("params", whole_weights(params, state))
            us = {path: w - weights[path] for path, w in _by_path("params", moved).items()}
        chains = [read(ours, node, gs) for node in chain_states(ours, after)]
        found: dict[str, Figures] = {}
        for path, g in gs.items():
            own = next((chain for chain in chains if path in chain.moments), chains[0])
            rate = rate_around(after) if own.rate is None else own.rate
            u = us.get(path, jnp.zeros_like(g))  # None moves nothing
            found[path] = measure(g, u, weights[path], own.moments.get(path), rate, axes.get(path))
        return found

    shapes = jax.eval_shape(look)
    places = tuple(
        (path, name, x.shape[0] if x.shape else None)
        for path in gs
        for name, x in shapes[path].items()
    )

    def end_to_end() -> jax.Array:
        found = look()
        values = [_whole(found[path][name]).reshape(-1) for path, name, _ in places]
        return jnp.concatenate(values) if values else jnp.zeros(0)

    def result(number: Any, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Both branches' vary over the axes that a gradient varies over.
        return jnp.asarray(number, jnp.int32), vary_together([values, *gs.values()])[0]

    # Also for every=1 nothing that a compiler knows to be true: it would join the two updates.
    number, values = jax.lax.cond(
        (count % min(every, 2**31 - 1) == 0) & (count >= 0) & jnp.asarray(when, bool),
        lambda: result(increment(count), end_to_end()),
        lambda: result(0, jnp.zeros(sum(layers or 1 for *_, layers in places))),
    )
    return Observation(number, values, places)


def _whole(x: jax.Array) -> jax.Array:
    """The figures of layers that a mesh with explicit axes splits, everywhere."""
    return jax.sharding.reshard(x, jax.P()) if any(jax.typeof(x).sharding.spec) else x


def _by_path(name: str, tree: PyTree) -> dict[str, Any]:
    check_inexact(tree, f"observe: {name}")
    leaves = leaves_by_path(tree)
    return {path: as_array(leaf) for path, leaf in leaves.items() if leaf is not None}


def _is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _axes(leaves: Mapping[str, Any], layers: Any) -> dict[str, int]:
    """The axis of the layers of each leaf that has some."""
    if not isinstance(layers, Mapping) or not all(map(_is_integer, layers.values())):
        raise TypeError(
            f"observe: layers is {layers!r}; expected an axis for the beginning of each path, such"
            " as {'blocks': 0}."
        )
    axes: dict[str, int] = {}
    for start, axis in layers.items():
        under = [path for path in leaves if path == start or path.startswith(f"{start}/")]
        if not under:
            raise ValueError(
                f"observe: layers has {start!r}, where no leaf is; expected the beginning of a"
                f" path: {', '.join(leaves)}."
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
