"""Packing: the float32 moments of many small leaves, end to end in a few buffers.

To pass an array into a compiled call and out again costs some microseconds, more than a step of
Adam on a thousand elements. So small leaves share buffers, up to 64 leaves each. To the stages a
buffer is one leaf.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.chains import segment as joined
from adamfn.chains.chain import elements, flat_states, nested, structure_of
from adamfn.chains.layout import Layout, Packed
from adamfn.chains.segment import Wanted
from adamfn.chains.step import assemble
from adamfn.chains.transform import GradientTransformation, check_transformation
from adamfn.core.bundle import Bundle
from adamfn.core.stage import CountedState, Stage
from adamfn.trees import PyTree, check_inexact, describe, matching_leaves, path_name

_WAY_OUT = "Pass gradients of these parameters, and the state that `init` made for them."


def packed(tx: GradientTransformation, below: int = 32768) -> GradientTransformation:
    """The same optimizer, with what it keeps of small leaves in shared buffers.

    A step of many small leaves is cheaper to trace and to run. Which leaves share a buffer follows
    from their shapes and dtypes, from the stages' masks and from `below`.

    Args:
      tx: a chain of ours with moments in float32, such as `adamw()`. What is not ours goes around
        it: `chain(optax.clip_by_global_norm(1.0), packed(adamw()))`.
      below: leaves of fewer elements are packed.

    Returns:
      A `GradientTransformation` that gives the same updates. Its state is that of `tx`, with a
      `Packed` in each field that is kept of leaves; `repack` moves one to the other. Libraries'
      states and checkpoints of other chains go by way of the plain one.

    Raises:
      ValueError: `tx` has parts that are not ours, moments in a format, or a stage that looks at a
        whole leaf; at `init`, parameters that are split over several devices.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> tx = adamfn.packed(adamfn.adam(0.1))
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> print(state[0].mu.buffers[0].shape)
    (5,)
    >>> params, state = adamfn.step(tx, params, state, params)
    >>> print(params["a"], params["b"])
    [0.9 0.9] [0.9 0.9 0.9]
    """
    check_transformation("packed: the first argument", tx)
    if not isinstance(below, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"packed: below is {below!r}; expected a number of elements, an integer.")
    structure = structure_of(tx)
    stages = list(elements(structure))
    for stage in stages:
        _check_packable(stage)

    def init(params: PyTree) -> PyTree:
        _check_whole(params)
        layout = Layout(stages, params, below)
        states = joined.first_states(layout.stages, layout.pack(params, _flat))
        return nested(structure, iter(states))

    def advance(
        updates: PyTree, state: PyTree, params: PyTree, extra: Mapping[str, Any], wanted: Wanted
    ) -> tuple[PyTree, PyTree, PyTree]:
        check_inexact(updates, "packed: updates")
        if params is not None:
            matching_leaves("packed: updates", updates, "params", params, _WAY_OUT)
        layout = Layout(stages, updates if params is None else params, below)
        states = flat_states(structure, state)
        _map_kept(stages, states, layout, lambda field: field)
        us, ps, states = joined.run(
            layout.stages,
            layout.pack(updates, Bundle),
            states,
            None if params is None else layout.pack(params, Bundle),
            extra,
            wanted,
        )
        us, ps = (None if tree is None else layout.unpack(tree) for tree in (us, ps))
        return us, ps, nested(structure, iter(states))

    def repacked(state: PyTree, params: PyTree) -> PyTree:
        states, layout = flat_states(structure, state), Layout(stages, params, below)
        packs = not any(
            isinstance(node, Packed) for node in jax.tree.leaves(state, is_leaf=_is_packed)
        )

        def moved(field: PyTree) -> PyTree:
            if not packs:
                return layout.unpack(field)
            matching_leaves("repack: params", params, "the state", field, _WAY_OUT)
            return layout.pack(field, _flat)

        moved_states = _map_kept(stages, states, None if packs else layout, moved)
        return nested(structure, iter(moved_states))

    takes = {name for stage in stages for name in stage.takes}
    made = assemble(init, advance, takes, made_of=structure)
    cast("Any", made.update).repacked = repacked
    return made


def repack(tx: GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """Moves a plain state into the arrangement of a packed transformation, or the reverse.

    Args:
      tx: what `packed` returned.
      state: its state, or that of the chain that it was made of.
      params: the parameters, or arrays of their shapes.

    Returns:
      The state of the other, in which the run goes on.

    Raises:
      TypeError, ValueError: `tx` is not packed; a state of another chain or of other parameters.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones(3)}
    >>> chain = adamfn.adam()
    >>> _, state = chain.update(params, chain.init(params))
    >>> state = adamfn.repack(adamfn.packed(chain), state, params)
    >>> print(state[0].count, state[0].mu.buffers[0])
    1 [0.1 0.1 0.1]
    """
    repacked = getattr(getattr(tx, "update", None), "repacked", None)
    if repacked is None:
        raise TypeError(f"repack: the first argument is {tx!r}; expected what `packed` returned.")
    return repacked(state, params)


def _flat(leaves: Sequence[Any]) -> jax.Array:
    return jnp.concatenate([jnp.asarray(leaf, jnp.float32).reshape(-1) for leaf in leaves])


def _map_kept(
    stages: Sequence[Stage],
    states: Sequence[Any],
    layout: Layout | None,
    function: Callable[[Any], Any],
) -> list[Any]:
    """The states, with a function applied to what they keep of leaves; packed as a layout says."""
    moved: list[Any] = []
    for stage, state in zip(stages, states, strict=True):
        own = state.stage if isinstance(state, CountedState) else state
        joined.check_state(stage, own, *stage.states)
        fields = {name: getattr(own, name) for name in stage.keeps}
        for name, field in fields.items() if layout else ():
            _check_packed(f"packed: {name} of {stage.name}", field, cast("Layout", layout))
        own = own._replace(**{name: function(field) for name, field in fields.items()})
        moved.append(state._replace(stage=own) if isinstance(state, CountedState) else own)
    return moved


def _is_packed(node: Any) -> bool:
    return isinstance(node, Packed)


def _check_packable(stage: Any) -> None:
    if not isinstance(stage, Stage):
        raise ValueError(
            f"packed: found {stage!r}, which is not a stage of ours. Put it around:"
            " chain(optax.clip_by_global_norm(1.0), packed(adamw()))."
        )
    if stage.moments != "float32":
        raise ValueError(
            f"packed: {stage.name} has moments={stage.moments!r}; expected 'float32'. Small leaves"
            " stay in float32 in every format, and what packs them is for float32 alone."
        )
    if stage.whole is not None:
        raise ValueError(
            f"packed: {stage.name} keeps bits of each weight, which buffers of float32 moments have"
            " no place for; expected a chain without it. Leave `packed` out."
        )
    if not stage.elementwise or stage.rests or stage.mean is not None:
        raise ValueError(
            f"packed: {stage.name} looks at whole leaves, which a buffer does not keep apart;"
            " expected stages that take each element by itself. Leave `packed` out."
        )


def _check_whole(params: PyTree) -> None:
    found: set[Any] = set()
    for path, leaf in jax.tree.leaves_with_path(params):
        if isinstance(leaf, Tracer) or not getattr(leaf, "committed", False):
            continue
        found |= leaf.sharding.device_set
        if len(found) > 1:
            raise ValueError(
                f"packed: with the parameter at {path_name(path) or 'the root'}, {describe(leaf)},"
                f" they lie on {len(found)} devices; expected all on one, as the leaves of a buffer"
                " lie together. Leave `packed` out."
            )


def _check_packed(name: str, field: Any, layout: Layout) -> None:
    if not isinstance(field, Packed):
        raise TypeError(
            f"{name} is not packed. `adamfn.repack` moves a plain state into this arrangement."
        )
    expected = [sum(jnp.size(layout.leaves[k]) for k in run) for run in layout.runs]
    found = [buffer.size for buffer in field.buffers] if layout.leaves else expected
    if found != expected:
        raise ValueError(
            f"{name} has buffers of {found} elements; expected {expected}. The state is of other"
            " parameters: make it with this transformation's init(params)."
        )
