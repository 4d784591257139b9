# SPDX-License-Identifier: Apache-2.0
"""`observe` measures every leaf at a training step; `step` observes a step and takes it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.chains import step as stepping
from adamfn.chains.leaves import kept_by_path
from adamfn.chains.transform import Transformation, apply_updates, where_updated
from adamfn.core.averages import increment
from adamfn.core.placement import vary_together
from adamfn.monitor.chain_states import count_of, moments_of, rate_of, states_of
from adamfn.monitor.figures import Figures, measure
from adamfn.stages.round_weights import whole_weights
from adamfn.trees import (
    Numeric,
    PyTree,
    as_array,
    check_inexact,
    described,
    leaves_by_path,
    matching_leaves,
    shown,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """The figures of a step. A tree of two arrays: it goes through `jit` and `scan`."""

    step: jax.Array
    """The number of the step, 1 at the first, int32; 0 if it was not looked at."""
    values: jax.Array
    """All figures, float32: one array is cheaper to return from a branch and to stack in a loop."""
    places: tuple[tuple[str, str, int | None], ...] = field(metadata={"static": True})
    """For each figure the leaf's path, the figure's name, and the number of layers, if any."""

    @property
    def leaves(self) -> dict[str, Figures]:
        """By a leaf's path, then by a figure's name; by layer along the last axis, if stacked."""
        found, start = dict[str, Figures](), 0
        for path, name, layers in self.places:
            where = start if layers is None else slice(start, start + layers)
            found.setdefault(path, {})[name] = self.values[..., where]
            start += 1 if layers is None else layers
        return found


def observe(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    ours: Transformation | None = None,
    every: int = 1,
    when: Numeric = True,
    layers: Mapping[str, int] | None = None,
    **extra: Any,
) -> Observation:
    """Measures the effect of the step to come on every leaf, in a few scalars each.

    `adamfn.monitor.figures` defines them. Call it inside a jitted step, before `update` or `step`;
    `monitor.step` is both, and copies less. A look takes `tx.update` once more: the program of the
    training stays as it is. On a mesh it gathers no leaf; inside `jax.shard_map` each device
    measures its shards. The arguments not listed are those of `adamfn.step`; with flax's optimizer,
    the state is `nnx.as_pure(optimizer.opt_state)`.

    Args:
      ours: the transformation of ours inside an optax wrapper; if optax makes it, as in
        `optax.inject_hyperparams(adamfn.adam)`, one made with the same arguments.
      every: looks at the first step and at every n-th after it.
      when: a bool; False skips the look: `optax.MultiSteps(tx, k)` moves nothing before
        `state.mini_step == k - 1`.
      layers: by the beginning of a path, the axis along which layers are stacked: `{"blocks": 0}`
        measures each layer of the leaves under `blocks`.

    Raises:
      TypeError, ValueError: neither `tx` nor `ours` is ours; a state of another chain; trees that
        do not match; layers along an axis that a leaf lacks.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.adam(0.1)
    >>> params, grads = {"w": jnp.array([3.0, -3.0])}, {"w": jnp.array([1.0, -2.0])}
    >>> figures = adamfn.monitor.observe(tx, grads, tx.init(params), params).leaves["w"]
    >>> print(", ".join(f"{name} {figures[name]:.2f}" for name in ("weight", "update", "signal")))
    weight 3.00, update 0.10, signal 1.00
    """
    stepping.check_extra(tx, extra, "observe")
    if not np.issubdtype(type(every), np.integer) or every < 1:
        raise ValueError(
            f"observe: every is {shown(every)}; expected a number of steps, at least 1."
        )
    if not isinstance(when, bool) and described(when) != "bool[]":
        raise TypeError(f"observe: when is {described(when)}; expected True, False or bool[].")
    params = where_updated(params, grads)
    gs, ps = _by_path("grads", grads), _by_path("params", params)
    matching_leaves("observe: params", params, "grads", grads, "Pass those before the step.")
    axes = _axes(gs, {} if layers is None else layers)
    name, ours = ("tx", tx) if ours is None else ("ours", ours)
    count = count_of(states_of(ours, state, name=name)[0])

    def look() -> dict[tuple[str, str], jax.Array]:
        updates, after = tx.update(grads, state, params, **extra)
        us, weights = _by_path("updates", updates), ps
        if kept_by_path("correction", after):  # measure the weights that they stand for
            moved = whole_weights(apply_updates(params, updates), after)
            weights = _by_path("params", whole_weights(params, state))
            us = {path: w - weights[path] for path, w in _by_path("params", moved).items()}
        states = states_of(ours, after, ps)
        with jax.numpy_dtype_promotion("standard"):  # of float32 figures and float64 leaves
            chains = [(moments_of(own, ps), rate_of(own, after)) for own in states]
        found: dict[tuple[str, str], jax.Array] = {}
        for path, g in gs.items():
            moments, rate = next((own for own in chains if path in own[0]), chains[0])
            u = us.get(path, jnp.zeros_like(g))  # None moves nothing
            with jax.numpy_dtype_promotion("standard"):
                figures = measure(g, u, weights[path], moments.get(path), rate, axes.get(path))
            found |= {(path, name): x for name, x in figures.items()}
        return dict(sorted(found.items()))  # as eval_shape returns it

    shapes = jax.eval_shape(look)
    places = tuple((*place, x.shape[0] if x.shape else None) for place, x in shapes.items())

    def result(number: Any, figures: Iterable[jax.Array]) -> tuple[jax.Array, jax.Array]:
        figures = [  # explicit axes of a mesh may split those of layers
            jax.sharding.reshard(x, jax.P()) if any(jax.typeof(x).sharding.spec) else x
            for x in figures
        ]
        values = jnp.concatenate([jnp.zeros(0, jnp.float32), *map(jnp.atleast_1d, figures)])
        # Both branches vary over the mesh axes that a gradient varies over.
        return jnp.asarray(number, jnp.int32), vary_together([values, *gs.values()])[0]

    # The condition is never a constant: XLA would merge this update with the step's.
    number, values = jax.lax.cond(
        (count % min(every, 2**31 - 1) == 0) & (count >= 0) & jnp.asarray(when, bool),
        lambda: result(increment(count), look().values()),
        lambda: result(0, [jnp.zeros(x.shape, jnp.float32) for x in shapes.values()]),
    )
    return Observation(number, values, places)


def step(
    tx: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    ours: Transformation | None = None,
    every: int = 1,
    when: Numeric = True,
    layers: Mapping[str, int] | None = None,
    return_updates: bool = False,
    **extra: Any,
) -> Any:
    """Observes a training step and takes it: `observe`, then `adamfn.step`.

    Arguments and errors are theirs. Separate calls have no order, so XLA copies each array that
    `step` writes in place. Here it waits for the look, and nothing is copied if the state and the
    parameters are donated. The `Observation` comes after the results of `adamfn.step`.

    >>> import adamfn, jax.numpy as jnp
    >>> tx, params = adamfn.adam(0.1), {"w": jnp.array([3.0, -3.0])}
    >>> params, state, seen = adamfn.monitor.step(tx, params, tx.init(params), params)
    >>> print(f"{params['w'][0]:.1f}", seen.leaves["w"]["weight"])
    2.9 3.0
    """
    seen = observe(
        tx, grads, state, params, ours=ours, every=every, when=when, layers=layers, **extra
    )
    # 0, which XLA does not know, on the count, which every leaf reads: this keeps the two in order.
    # XLA would remove an optimization barrier before it decides which arrays to copy.
    nothing = jnp.where(seen.step < 0, 1, 0).astype(jnp.int32)
    state = jax.tree.map(lambda x: x + nothing if described(x) == "int32[]" else x, state)
    moved = stepping.step(tx, grads, state, params, return_updates=return_updates, **extra)
    return *moved, seen


def _by_path(name: str, tree: PyTree) -> dict[str, Any]:
    check_inexact(tree, f"observe: {name}")
    leaves = leaves_by_path(tree)
    return {path: as_array(leaf) for path, leaf in leaves.items() if leaf is not None}


def _axes(leaves: Mapping[str, Any], layers: Any) -> dict[str, int]:
    """The axis along which the layers of a leaf are stacked, by the paths of such leaves."""
    if not isinstance(layers, Mapping):
        raise TypeError(
            f"observe: layers is {shown(layers)}; expected axes by paths: {{'blocks': 0}}."
        )
    axes: dict[str, int] = {}
    for start, axis in layers.items():
        under = {path: x for path, x in leaves.items() if f"{path}/".startswith(f"{start}/")}
        if not under or not all(axis in range(-x.ndim, x.ndim) for x in under.values()):
            among = ", ".join(f"{path} {described(x)}" for path, x in (under or leaves).items())
            raise ValueError(
                f"observe: layers has {start!r}: {shown(axis)}; expected the beginning of a path,"
                f" and an axis of all leaves under it: {among}."
            )
        axes |= {path: axis % x.ndim for path, x in under.items()}
    return axes
