"""The state of a fused Adam, and its way to the chain's state and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import chex
import jax
import jax.numpy as jnp

from adamfn.averages import ScaleByMomentsState
from adamfn.bias import BiasCorrectState
from adamfn.formats import Format
from adamfn.fused.packing import Packed, elements, pack, packed_leaves, runs, unpack
from adamfn.learning_rate import ScaleByLrState
from adamfn.state import check_state
from adamfn.storage import as_decoded
from adamfn.trees import PyTree, check_inexact, describe, matching_leaves, path_name
from adamfn.weight_decay import AddDecayedWeightsState

WAY_OUT = "Pass gradients of these parameters, and the state that `init` made for them."
"""The end of an error message when the trees do not match."""


class FusedAdamState(NamedTuple):
    """State of `fused_adam` and `fused_adamw`."""

    count: chex.Array
    """Steps taken: int32 scalar."""
    mu: Packed
    """The average m of the gradients: as in `ScaleByMomentsState`, small leaves packed."""
    nu: Packed
    """The average v of their squares: likewise."""
    learning_rate: chex.Array
    """The rate of the last step, to be logged (before the first: of the first to come)."""


def to_chain(state: FusedAdamState, like: PyTree, params: PyTree) -> PyTree:
    """A fused state as the state of the chain of the same name, `adam` or `adamw`.

    Args:
      state: the state of `fused_adam` or `fused_adamw`.
      like: what the chain's `init` returns for the parameters; `jax.eval_shape` of it will do.
      params: the parameters, or arrays of their shapes.

    Returns:
      The chain's state, in which the run goes on.

    Raises:
      TypeError, ValueError: a state of another transformation, or of other parameters.

    >>> import adamfn, jax
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones(3)}
    >>> fused, chain = adamfn.fused_adamw(), adamfn.adamw()
    >>> _, state = adamfn.step(fused, params, fused.init(params), params)
    >>> state = adamfn.fused.to_chain(state, jax.eval_shape(chain.init, params), params)
    >>> print(state[0].count, state[0].mu["w"])
    1 [0.1 0.1 0.1]
    """
    state = check_state("to_chain", state, FusedAdamState)
    check_inexact(params, "to_chain: params")
    mu, nu = unpacked("to_chain", state, params)
    parts: list[Any] = []
    for part in _parts("to_chain: like", like):
        if isinstance(part, ScaleByMomentsState):
            parts.append(ScaleByMomentsState(state.count, mu, nu))
        elif isinstance(part, ScaleByLrState):
            parts.append(ScaleByLrState(state.count, state.learning_rate))
        else:
            parts.append(type(part)(state.count))
    return tuple(parts)


def from_chain(state: PyTree, like: FusedAdamState, params: PyTree) -> FusedAdamState:
    """The state of the chain `adam` or `adamw` as the state of its fused form.

    Args:
      state: the state of `adam` or `adamw`.
      like: what the `init` of `fused_adam` or `fused_adamw`, with the same `moments=`, returns for
        the parameters; `jax.eval_shape` of it will do.
      params: the parameters, or arrays of their shapes.

    Returns:
      The fused state, in which the run goes on.

    Raises:
      TypeError, ValueError: a state of another transformation, or of other parameters.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones(3)}
    >>> fused, chain = adamfn.fused_adam(), adamfn.adam()
    >>> _, state = chain.update(params, chain.init(params), params)
    >>> state = adamfn.fused.from_chain(state, fused.init(params), params)
    >>> print(state.count, state.mu.buffers[0])
    1 [0.1 0.1 0.1]
    """
    like = check_state("from_chain: like", like, FusedAdamState)
    check_inexact(params, "from_chain: params")
    unpacked("from_chain: like", like, params)
    parts = _parts("from_chain: state", state)
    moments = next(part for part in parts if isinstance(part, ScaleByMomentsState))
    rate = next(part for part in parts if isinstance(part, ScaleByLrState))
    named, treedef = jax.tree.flatten_with_path(params)
    packed = packed_leaves(like.mu, treedef)
    for field, tree in (("mu", moments.mu), ("nu", moments.nu)):
        check_stored(f"from_chain: {field}", params, tree)
        for number in packed:
            (path, leaf), part = named[number], treedef.flatten_up_to(tree)[number]
            if jnp.shape(part) != jnp.shape(leaf):
                raise ValueError(
                    f"from_chain: {field} at {path_name(path) or 'the root'} is {describe(part)};"
                    f" expected float32 of shape {jnp.shape(leaf)}. Give both transformations the"
                    " same moments=, and pass the parameters that the states were made for."
                )
    mu, nu = (pack(tree, treedef, packed) for tree in (moments.mu, moments.nu))
    return FusedAdamState(moments.count, mu, nu, rate.learning_rate)


def unpacked(caller: str, state: FusedAdamState, params: PyTree) -> tuple[PyTree, PyTree]:
    """Mu and nu as trees of the parameters' structure.

    Raises:
      ValueError: they are of other parameters.
    """
    leaves, treedef = jax.tree.flatten(params)
    for field, moment in (("mu", state.mu), ("nu", state.nu)):
        check_packed(caller, field, moment, params)
    return unpack(state.mu, leaves, treedef), unpack(state.nu, leaves, treedef)


def check_moments(
    name: str, state: FusedAdamState, params: PyTree, formats: Sequence[Format | None]
) -> None:
    """Checks that a state's moments are those of the parameters, in these formats.

    Raises:
      TypeError, ValueError: they are not; names the leaf.
    """
    leaves, treedef = jax.tree.flatten(params)
    trees = {"params": params}
    for field, moment in (("mu", state.mu), ("nu", state.nu)):
        check_packed(name, field, moment, params)
        parts = treedef.flatten_up_to(moment.leaves)
        for number in packed_leaves(moment, treedef):
            parts[number] = jax.ShapeDtypeStruct(jnp.shape(leaves[number]), jnp.float32)
        trees[field] = as_decoded(name, field, params, formats, treedef.unflatten(parts))
    matching_leaves(trees, name, ("nu",), WAY_OUT)


def check_packed(caller: str, field: str, moment: Packed, params: PyTree) -> None:
    """Checks that a packed moment is one of these parameters.

    Raises:
      ValueError: its structure or the sizes of its buffers are others.
    """
    check_stored(f"{caller}: {field}", params, moment.leaves)
    leaves, treedef = jax.tree.flatten(params)
    packed = runs(packed_leaves(moment, treedef))
    expected = [elements(leaves, run) for run in packed]
    found = [buffer.size for buffer in moment.buffers]
    if found != expected:
        raise ValueError(
            f"{caller}: {field} has packed buffers of {found} elements; expected {expected}. The"
            " state is of other parameters, or of the same on another number of devices: make it"
            " with this transformation's init(params), or move it by to_chain and from_chain."
        )


def check_stored(name: str, params: PyTree, tree: PyTree) -> None:
    """Checks that a tree goes down as far as the parameters' does.

    Raises:
      ValueError: it has another structure.
    """
    try:
        jax.tree.structure(params).flatten_up_to(tree)
    except (TypeError, ValueError) as error:
        found = str(error).rstrip(".")
        raise ValueError(
            f"{name} has another structure than params: {found}. Pass the parameters that the state"
            " was made for."
        ) from None


def _parts(name: str, state: PyTree) -> tuple[Any, ...]:
    known = (ScaleByMomentsState, BiasCorrectState, AddDecayedWeightsState, ScaleByLrState)
    parts = cast("tuple[Any, ...]", state) if type(state) is tuple else ()
    if not (
        parts
        and isinstance(parts[0], ScaleByMomentsState)
        and isinstance(parts[-1], ScaleByLrState)
        and all(isinstance(part, known) for part in parts)
    ):
        found = ", ".join(type(part).__name__ for part in parts) or type(state).__name__
        raise TypeError(f"{name} is a {found}; expected the state of adam or adamw.")
    return parts
