# SPDX-License-Identifier: Apache-2.0
"""`packed`: many small leaves as a few long ones.

To pass an array into a compiled call and out again costs some microseconds, more than a step of
Adam on a thousand elements. So small leaves are raveled into long ones, up to 64 in each. The chain
inside sees long leaves, and knows nothing of it.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import itemgetter
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from adamfn.chains.chain import Chain, Moved, Wrapped, chain_of, flat_states, nested
from adamfn.chains.leaves import Request, devices_of, masks_of
from adamfn.chains.segment import update_dtype_of
from adamfn.chains.transform import GradientTransformation, check_transformation
from adamfn.core.stage import Stage
from adamfn.core.weights import Weights
from adamfn.trees import (
    PyTree,
    as_array,
    at_least,
    check_inexact,
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

    A step of many small leaves is then cheaper to trace and to run, and its updates are the same.
    The state is that of `tx`, with a `Packed` in each field that holds arrays of leaves; `repack`
    converts one into the other. Which leaves share a long one follows from shapes and dtypes, from
    the stages' masks and from `below`.

    Args:
      tx: a chain of ours with moments in float32, such as `adamw()`. Other transformations go
        around it: `chain(optax.clip_by_global_norm(1.0), packed(adamw()))`.
      below: leaves of fewer elements are raveled.

    Raises:
      ValueError: `tx` has parts of other libraries, moments in a format, or a stage that needs a
        statistic of its leaf; at `init`, parameters that are split over several devices.

    >>> import adamfn, jax.numpy as jnp
    >>> tx = adamfn.packed(adamfn.adam(0.1))
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    >>> params, state = adamfn.step(tx, params, tx.init(params), params)
    >>> print(params["b"], state[0].mu.buffers[0].shape)
    [0.9 0.9 0.9] (5,)
    """
    check_transformation("packed: the first argument", tx)
    if not isinstance(below, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"packed: below is {shown(below)}; expected a number of elements, an integer."
        )
    chain = chain_of(tx)
    for part in [tx] if chain is None or isinstance(chain, Wrapped) else chain.parts:
        _check_packable(part)
    return _PackedChain(cast("Chain", chain), below).transformation


def repack(tx: GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """Converts the state of a plain chain into that of a packed one, or the reverse.

    Args:
      tx: the result of `packed`, in wrappers of ours or not.
      state: its state, or that of the chain that it was made of.
      params: the parameters, or arrays of their shapes.

    Raises:
      TypeError, ValueError: `tx` is not packed; a state of another chain or of other parameters.

    >>> import adamfn, jax.numpy as jnp
    >>> plain, params = adamfn.adam(), {"w": jnp.ones(3)}
    >>> state = adamfn.repack(adamfn.packed(plain), plain.init(params), params)
    >>> print(state[0].mu.buffers[0])
    [0. 0. 0.]
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


def _is_packed(node: Any) -> bool:
    return isinstance(node, Packed)


def _raveled(leaves: list[Any]) -> jax.Array:
    return jnp.concatenate([jnp.asarray(leaf, jnp.float32).reshape(-1) for leaf in leaves])


class _PackedChain(Wrapped):
    def __init__(self, inner: Chain, below: int) -> None:
        super().__init__(inner)
        self._below = below

    def init(self, params: PyTree) -> PyTree:
        leaves = jax.tree.leaves_with_path(params)
        found = devices_of({path_name(path) or "the root": leaf for path, leaf in leaves})
        if len(devices := frozenset[Any]().union(*found)) > 1:
            *_, name = found.values()
            raise ValueError(
                f"packed: with the parameter at {name} they are on {len(devices)} devices; expected"
                " one device, as the leaves of a long leaf are together. Leave `packed` out."
            )
        layout = _Layout(self.inner, params, self._below)
        return layout.chain.init(layout.pack(params))

    def advance(self, updates: PyTree, state: PyTree, request: Request) -> Moved:
        params = request.params
        check_inexact(updates, "packed: updates")
        if params is not None:
            matching_leaves("packed: updates", updates, "params", params, _WAY_OUT)
        layout = _Layout(self.inner, updates if params is None else params, self._below)
        if params is not None:
            request = request._replace(params=layout.pack(params))
        us, moved, state = layout.chain.advance(layout.pack(updates), state, request)
        gs = [as_array(leaf) for leaf in jax.tree.leaves(updates)]
        ps = [as_array(leaf) for leaf in jax.tree.leaves(params)] or gs
        if request.updates:
            us = layout.unpack(us, map(update_dtype_of, gs, ps))
        if request.moves:
            moved = layout.unpack(moved, [p.dtype for p in ps])
        return us, moved, state

    def repacked(self, state: PyTree, params: PyTree) -> PyTree:
        layout = _Layout(self.inner, params, self._below)
        nodes = jax.tree.leaves(state, is_leaf=_is_packed)
        like, converted = params, layout.pack
        if any(map(_is_packed, nodes)):
            like, converted = jax.eval_shape(layout.pack, params), layout.unpack
        states: list[Any] = []
        for stage, own in zip(self.stages, flat_states(self.structure, state), strict=True):
            fields: dict[str, Any] = {name: getattr(own, name, None) for name in stage.keeps}
            for name, field in fields.items():
                matching_leaves("repack: params", like, f"{name} of the state", field, _WAY_OUT)
            new = {k: converted(x) for k, x in fields.items()}
            states.append(own._replace(**new) if new else own)
        return nested(self.structure, iter(states))


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
        stages: list[Stage] = []
        for stage, mask in zip(chain.stages, masks, strict=True):
            packed = self.pack(self._treedef.unflatten(mask), itemgetter(0))
            stages.append(replace(stage, mask=None if stage.mask is None else packed))
        self.chain = Chain(nested(chain.structure, iter(stages)))

    def pack(self, tree: PyTree, joined: Callable[[list[Any]], Any] = _raveled) -> Packed:
        """A tree of the parameters' structure, with its small leaves raveled."""
        parts: list[Any] = self._treedef.flatten_up_to(tree)
        buffers = [joined([parts[k] for k in run]) for run in self._runs]
        for k in sum(self._runs, start=list[int]()):
            parts[k] = None
        # One leaf for a tree without leaves, as in `core.leaf.as_fields`.
        return Packed(self._treedef.unflatten(parts), tuple(buffers) if parts else jnp.zeros((0,)))

    def unpack(self, packed: Packed, dtypes: Iterable[Any] = ()) -> PyTree:
        """The inverse of `pack`, with the dtype of each leaf; float32 if none are given."""
        parts, dtypes = list[Any](self._treedef.flatten_up_to(packed.leaves)), [*dtypes]
        for run, buffer in zip(self._runs, packed.buffers, strict=True):
            start = 0
            for k in run:
                end = start + self._leaves[k].size
                part = buffer[start:end].reshape(self._leaves[k].shape)
                parts[k], start = part.astype(dtypes[k]) if dtypes else part, end
        return self._treedef.unflatten(parts)


def _check_packable(part: Any) -> None:
    if not isinstance(part, Stage):
        raise ValueError(
            f"packed: found {shown(part)}, which is not an adamfn stage. Put it around:"
            " chain(optax.clip_by_global_norm(1.0), packed(adamw()))."
        )
    reason = None
    if part.moments != "float32":
        reason = f"has moments={shown(part.moments)}, and small leaves are float32 in every format"
    elif isinstance(part.formula, Weights):
        reason = "keeps bits of each weight, and long leaves are float32"
    elif not part.elementwise:
        reason = "needs a statistic of each leaf, and long leaves hold many"
    if reason is not None:
        raise ValueError(
            f"packed: {part.name} {reason}; expected elementwise stages with moments='float32'."
            " Leave `packed` out."
        )
