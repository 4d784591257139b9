"""`packed`: many small leaves as a few long ones.

To pass an array into a compiled call and out again costs some microseconds, more than a step of
Adam on a thousand elements. So small leaves are raveled into long ones, up to 64 in each. The chain
inside sees long leaves, and knows nothing of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer

from adamfn.chains.chain import Chain, Moved, Wrapped, chain_of, flat_states, nested
from adamfn.chains.leaves import Request, masks_of
from adamfn.chains.segment import update_dtype_of
from adamfn.chains.transform import GradientTransformation, check_transformation
from adamfn.core.stage import Stage
from adamfn.core.weights import Weights
from adamfn.trees import (
    PyTree,
    as_array,
    at_least,
    check_inexact,
    describe,
    exported,
    matching_leaves,
    path_name,
    shown,
)

_LEAVES = 64
"""Leaves in a long one. The time that XLA takes to compile a call grows with the square."""

_WAY_OUT = "Pass gradients of these parameters, and the state that `init` made for them."


@exported
class Packed(NamedTuple):
    """A tree of parameters' shapes, with small leaves raveled into long ones."""

    leaves: PyTree
    """The other leaves: the parameters' tree, None where a leaf is raveled."""
    buffers: Any
    """A tuple of the long leaves: float32 of shape (elements,)."""


def packed(tx: GradientTransformation, below: int = 32768) -> GradientTransformation:
    """The same optimizer, with small leaves raveled into a few long ones.

    A step of many small leaves is cheaper to trace and to run. The leaves of one long leaf follow
    from shapes and dtypes, from the stages' masks and from `below`.

    Args:
      tx: a chain of ours with moments in float32, such as `adamw()`. Other transformations go
        around it: `chain(optax.clip_by_global_norm(1.0), packed(adamw()))`.
      below: leaves of fewer elements are raveled.

    Returns:
      A `GradientTransformation` with the same updates. Its state is that of `tx`, with a `Packed`
      in each field that holds arrays of leaves; `repack` converts one into the other.

    Raises:
      ValueError: `tx` has parts of other libraries, moments in a format, or a stage that needs a
        statistic of its leaf; at `init`, parameters that are split over several devices.

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
        raise TypeError(
            f"packed: below is {shown(below)}; expected a number of elements, an integer."
        )
    chain = chain_of(tx)
    for stage in [tx] if chain is None or not chain.fuses else chain.parts:
        _check_packable(stage)
    return _PackedChain(cast("Chain", chain), below).transformation


def repack(tx: GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """Converts the state of a plain chain into that of a packed one, or the reverse.

    Args:
      tx: the result of `packed`, in wrappers of ours or not.
      state: its state, or that of the chain that it was made of.
      params: the parameters, or arrays of their shapes.

    Returns:
      The state of the other.

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
    chain = packed_chain_of(tx)
    if chain is None:
        raise TypeError(
            f"repack: the first argument is {shown(tx)}; expected the result of `packed`."
        )
    return chain.repacked(state, params)


def packed_chain_of(tx: Any) -> "_PackedChain | None":
    """The packed chain in a transformation, which may be in wrappers of ours."""
    chain = chain_of(tx)
    while isinstance(chain, Wrapped) and not isinstance(chain, _PackedChain):
        chain = chain.inner
    return chain if isinstance(chain, _PackedChain) else None


class _PackedChain(Wrapped):
    def __init__(self, inner: Chain, below: int) -> None:
        super().__init__(inner)
        self._below = below

    def init(self, params: PyTree) -> PyTree:
        _check_on_one_device(params)
        layout = _Layout(self.inner, params, self._below)
        return layout.chain.init(layout.pack(params))

    def advance(self, updates: PyTree, state: PyTree, request: Request) -> Moved:
        params = request.params
        check_inexact(updates, "packed: updates")
        if params is not None:
            matching_leaves("packed: updates", updates, "params", params, _WAY_OUT)
        layout = _Layout(self.inner, updates if params is None else params, self._below)
        _with_fields(self, state, layout.checked)
        if params is not None:
            request = request._replace(params=layout.pack(params))
        us, moved, state = layout.chain.advance(layout.pack(updates), state, request)
        gs = [as_array(leaf) for leaf in jax.tree.leaves(updates)]
        ps = [as_array(leaf) for leaf in jax.tree.leaves(params)] or gs
        if request.updates:
            us = layout.unpack(us, list(map(update_dtype_of, gs, ps)))
        if request.moves:
            moved = layout.unpack(moved, [p.dtype for p in ps])
        return us, moved, state

    def repacked(self, state: PyTree, params: PyTree) -> PyTree:
        layout = _Layout(self.inner, params, self._below)
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Packed))
        is_packed = any(isinstance(node, Packed) for node in nodes)

        def moved(name: str, field: PyTree) -> PyTree:
            if is_packed:
                return layout.unpack(layout.checked(name, field))
            matching_leaves("repack: params", params, "the state", field, _WAY_OUT)
            return layout.pack(field)

        return _with_fields(self, state, moved)


class _Layout:
    """Which leaves of a tree share each long leaf."""

    def __init__(self, chain: Chain, params: PyTree, below: int) -> None:
        check_inexact(params, "packed: params")
        leaves, self._treedef = jax.tree.flatten(params)
        self._leaves = [as_array(leaf) for leaf in leaves]
        masks = masks_of(chain.stages, params, params)
        alike: dict[Any, list[int]] = {}
        for index, (leaf, *changed) in enumerate(zip(self._leaves, *masks, strict=True)):
            dtype = jnp.result_type(leaf)
            real = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
            if real and at_least(below - 1, jnp.size(leaf)):
                alike.setdefault(tuple(changed), []).append(index)
        self._runs = [
            own[i : i + _LEAVES] for own in alike.values() for i in range(0, len(own), _LEAVES)
        ]
        stages = [
            replace(stage, mask=None if stage.mask is None else self._packed_mask(mask))
            for stage, mask in zip(chain.stages, masks, strict=True)
        ]
        self.chain = Chain(nested(chain.structure, iter(stages)))

    def pack(self, tree: PyTree) -> Packed:
        """A tree of the parameters' structure, with its small leaves raveled."""
        parts: list[Any] = self._treedef.flatten_up_to(tree)
        return self._arranged(parts, [_raveled([parts[k] for k in run]) for run in self._runs])

    def unpack(self, packed: Packed, dtypes: Sequence[Any] = ()) -> PyTree:
        """The inverse of `pack`, with the dtype of each leaf; float32 if none are given."""
        parts: list[Any] = self._treedef.flatten_up_to(packed.leaves)
        for run, buffer in zip(self._runs, packed.buffers, strict=True):
            shapes = [self._leaves[k].shape for k in run]
            ends = accumulate(map(math.prod, shapes))
            for k, shape, end in zip(run, shapes, ends, strict=True):
                part = buffer[end - math.prod(shape) : end].reshape(shape)
                parts[k] = part.astype(dtypes[k]) if dtypes else part
        return self._treedef.unflatten(parts)

    def checked(self, name: str, field: Any) -> Packed:
        """A field of the state, if it is packed as this layout says."""
        if not isinstance(field, Packed):
            raise TypeError(
                f"packed: {name} is not packed. `adamfn.repack` converts the state of a plain"
                " chain."
            )
        expected = [sum(self._leaves[k].size for k in run) for run in self._runs]
        found = [buffer.size for buffer in field.buffers] if self._leaves else expected
        if found != expected:
            raise ValueError(
                f"packed: {name} has buffers of {found} elements; expected {expected}. The state is"
                " of other parameters: make it with this transformation's init(params)."
            )
        return field

    def _packed_mask(self, mask: Sequence[bool]) -> Packed:
        return self._arranged(mask, [mask[run[0]] for run in self._runs])

    def _arranged(self, parts: Sequence[Any], buffers: Sequence[Any]) -> Packed:
        shared = {k for run in self._runs for k in run}
        alone = [None if k in shared else part for k, part in enumerate(parts)]
        # One leaf for a tree without leaves, as in `core.leaf.as_fields`.
        return Packed(self._treedef.unflatten(alone), tuple(buffers) if parts else jnp.zeros((0,)))


def _raveled(leaves: Sequence[Any]) -> jax.Array:
    return jnp.concatenate([jnp.asarray(leaf, jnp.float32).reshape(-1) for leaf in leaves])


def _with_fields(chain: Chain, state: PyTree, function: Callable[[str, PyTree], PyTree]) -> PyTree:
    """The state, with a function applied to the fields that hold arrays of leaves."""
    moved: list[Any] = []
    for stage, own in zip(chain.stages, flat_states(chain.structure, state), strict=True):
        fields = {name: getattr(own, name, None) for name in stage.keeps}
        new = {name: function(f"{name} of {stage.name}", field) for name, field in fields.items()}
        moved.append(own._replace(**new) if new else own)
    return nested(chain.structure, iter(moved))


def _check_packable(stage: Any) -> None:
    if not isinstance(stage, Stage):
        raise ValueError(
            f"packed: found {shown(stage)}, which is not an adamfn stage. Put it around:"
            " chain(optax.clip_by_global_norm(1.0), packed(adamw()))."
        )
    reason = None
    if stage.moments != "float32":
        reason = f"has moments={shown(stage.moments)}, and small leaves are float32 in every format"
    elif isinstance(stage.formula, Weights):
        reason = "keeps bits of each weight, and long leaves are float32"
    elif not stage.elementwise:
        reason = "needs a statistic of each leaf, and long leaves hold many"
    if reason is not None:
        raise ValueError(
            f"packed: {stage.name} {reason}; expected elementwise stages with moments='float32'."
            " Leave `packed` out."
        )


def _check_on_one_device(params: PyTree) -> None:
    found: set[Any] = set()
    for path, leaf in jax.tree.leaves_with_path(params):
        if isinstance(leaf, Tracer) or not getattr(leaf, "committed", False):
            continue
        found |= leaf.sharding.device_set
        if len(found) > 1:
            raise ValueError(
                f"packed: with the parameter at {path_name(path) or 'the root'}, {describe(leaf)},"
                f" they are on {len(found)} devices; expected one device, as the leaves of a long"
                " leaf are together. Leave `packed` out."
            )
