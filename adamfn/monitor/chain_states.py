# SPDX-License-Identifier: Apache-2.0
"""The states of a chain of ours inside any state, and the moments that they hold."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from adamfn.chains.chain import chain_of
from adamfn.chains.leaves import has_field
from adamfn.chains.packed import Packed, packed_chain_of
from adamfn.core import formulas
from adamfn.core.stage import EmptyState, Stage, counted
from adamfn.formats import choose_formats
from adamfn.formats.arrangement import kept_leaves
from adamfn.formats.format import answer
from adamfn.interop.converting import converted
from adamfn.monitor.figures import Moments
from adamfn.trees import PyTree, described, path_name, shown

States: TypeAlias = list[tuple[Stage, Any]]  # of a chain


def states_of(
    tx: Any, state: PyTree, leaves: Mapping[str, Any] | None = None, name: str = "tx"
) -> list[States]:
    """The states of a chain inside any state, in their order; unpacked if leaves are given."""
    chain = chain_of(tx)
    if chain is None or not chain.stages:
        raise TypeError(
            f"observe: {name} is {shown(tx)}; expected a transformation of adamfn's, such as"
            " adamw(). Inside optax's wrappers, pass the one that is wrapped as ours=."
        )
    nodes = jax.tree.leaves(state, is_leaf=lambda node: _paired(tx, node) is not None)
    nodes = [node for node in nodes if _paired(tx, node) is not None]
    if not nodes:
        raise ValueError(
            f"observe: found no state of {', '.join(stage.name for stage in chain.stages)} in"
            f" {described(state)}; expected its state, or one restored into tx.init(params)."
        )
    return [_paired(tx, node, leaves) or [] for node in nodes]


def count_of(states: States) -> jax.Array:
    """The steps that a chain has counted."""
    return next(state.count for _, state in states if has_field(state, "count"))


def rate_of(states: States, around: PyTree) -> Any:
    """The learning rate that a chain keeps, or `optax.inject_hyperparams` around it, or None."""
    rates = [state.learning_rate for _, state in states if has_field(state, "learning_rate")]
    if rates:
        return rates[-1]
    nodes = jax.tree.leaves(around, is_leaf=lambda node: has_field(node, "hyperparams"))
    found = [
        node.hyperparams.get("learning_rate") for node in nodes if has_field(node, "hyperparams")
    ]
    return found[0] if len(found) == 1 else None


_OTHER_DIVISORS = (formulas.atan2_ratio, formulas.mixed_ratio, formulas.normalized_average)
"""Formulas whose update is not mu over the root of nu, after a correction."""


def moments_of(states: States, leaves: Mapping[str, Any]) -> dict[str, Moments]:
    """The moments in a chain's states, by the paths of their leaves."""
    found: dict[str, Moments] = {}
    pair = next((pair for pair in states if pair[0].has_moments), None)
    if pair is None:
        return found
    stage, state = pair
    kept = [*kept_leaves(state)]
    names = [path_name(path) for path, *_ in kept]  # `moments=` may ask for the leaf's dtype
    formats = {name: choose_formats(stage.moments, {name: leaves[name]})[0] for name in names}
    wide = converted(state, lambda name, _: formats[name] or "float32", "float32")
    for name, (_, codes, _), (_, moments, _) in zip(names, kept, kept_leaves(wide), strict=True):
        mu, nu = moments["mu"], moments["nu"]
        quotient = _quotient(stage, state, count_of(states), mu, moments.get("nu_max", nu))
        ends = answer(formats[name], "ends")(codes["mu"], codes["nu"]) if formats[name] else {}
        found[name] = Moments(mu, nu, quotient, ends)
    return found


def _quotient(stage: Stage, state: Any, count: jax.Array, mu: Any, nu: Any) -> Any:
    """The corrected mu over the corrected root of nu, and where eps is most of the divisor."""
    if stage.formula.__module__ != formulas.__name__ or stage.formula in _OTHER_DIVISORS:
        return None
    count = jnp.maximum(count, 1)
    at = stage.scalars(count, state, {})[0][0]
    c1, c2 = at.b1.bias(count), at.b2.bias(count)
    root, factor, least = jnp.sqrt(nu), jnp.sqrt(c2), at.eps
    if stage.formula is formulas.infinity_ratio:  # nu is |g| + eps, not its square
        root, factor, least = nu, 1, 2 * at.eps
    return jnp.abs(mu) / jnp.where(root == 0, 1, root) * (factor / c1), root < least


def _paired(part: Any, node: Any, leaves: Mapping[str, Any] | None = None) -> States | None:
    """The stages of a structure with their states; None if the node is the state of another."""
    if isinstance(part, Stage):
        # A rate that is an array is not kept: the chain that ours= stands for may have none.
        others = (EmptyState, counted(EmptyState)) if part.start else ()
        return [(part, node)] if isinstance(node, (*part.states, *others)) else None
    if type(part) is tuple:
        if type(node) is not tuple or len(node) != len(part):
            return None
        pairs = [_paired(*both, leaves) for both in zip(part, node, strict=True)]
        return None if None in pairs else [pair for own in pairs for pair in own or ()]
    chain, packed = chain_of(part), packed_chain_of(part)
    if packed is not None and leaves is not None:
        node = packed.repacked(node, _unpacked(node, leaves))
    return [] if chain is None else _paired(chain.structure, node, leaves)


def _unpacked(node: Any, leaves: Mapping[str, Any]) -> PyTree:
    """The tree of leaves that a packed state is of: without the ones that a wrapper masked."""
    fields = jax.tree.leaves(node, is_leaf=lambda part: isinstance(part, Packed))
    packed = next(field for field in fields if isinstance(field, Packed))
    paths, treedef = jax.tree.flatten_with_path(packed.leaves, is_leaf=lambda leaf: leaf is None)
    return treedef.unflatten([leaves.get(path_name(path)) for path, _ in paths])
