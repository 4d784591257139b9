"""Finding what a chain of ours keeps of each leaf, whatever its state is wrapped in."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.chains.chain import chain_of
from adamfn.chains.packed import Packed, packed_chain_of
from adamfn.chains.transform import summary
from adamfn.core import formulas
from adamfn.core.averages import Decay, Shares, bias
from adamfn.core.leaf import decode, kept_by_leaf
from adamfn.core.stage import EmptyState, Stage, counted
from adamfn.formats import choose_formats
from adamfn.formats.arrangement import kept_leaves
from adamfn.monitor.figures import Moments, at_the_ends
from adamfn.trees import PyTree, describe, path_name

_KNOWN = (
    formulas.ratio,
    formulas.max_ratio,
    formulas.nesterov_ratio,
    formulas.rectified_ratio,
    formulas.infinity_ratio,
)
"""The formulas whose first scalars are `MomentScalars` with an eps."""


class ChainState(NamedTuple):
    """What one state of a chain says of a step."""

    rate: jax.Array | None
    moments: dict[str, Moments]
    """By the paths of the leaves that it has moments of."""


def chain_states(tx: Any, state: PyTree, name: str = "tx") -> list[Any]:
    """The states of a chain in a state, by itself or inside optax's wrappers, in their order.

    Raises:
      TypeError: the transformation is not ours.
      ValueError: there is no state of it.
    """
    if not _names(tx):
        raise TypeError(
            f"observe: {name} is {summary(tx)}; expected a transformation of adamfn's, such as"
            " adamw(). Inside optax's wrappers, ours= is the one that is wrapped, or one made as it"
            " was."
        )
    nodes = jax.tree.leaves(state, is_leaf=lambda node: _is_state_of(tx, node))
    found = [node for node in nodes if _is_state_of(tx, node)]
    if not found:
        raise ValueError(
            f"observe: found no state of {', '.join(_names(tx))} in {describe(state)};"
            " expected the state that `update` returned. It belongs to another chain, or was"
            " restored into other containers: restore into tx.init(params)."
        )
    return found


def count_of(tx: Any, node: Any) -> jax.Array:
    """The steps that a state of a chain has counted."""
    return next(state.count for _, state in _stages(tx, node) if _has(state, "count"))


def rate_around(state: PyTree) -> Any:
    """The rate that `optax.inject_hyperparams` keeps for what it makes; None without it."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: _has(node, "hyperparams"))
    found = [node.hyperparams.get("learning_rate") for node in nodes if _has(node, "hyperparams")]
    return found[0] if len(found) == 1 else None


def read(tx: Any, node: Any, params: dict[str, Any]) -> ChainState:
    """What a state of a chain says, of parameters by their paths."""
    rate, moments = None, dict[str, Moments]()
    for stage, state in _stages(tx, node, params):
        rate = state.learning_rate if _has(state, "learning_rate") else rate
        if stage.has_moments and not moments:
            moments = _moments(stage, state, jnp.maximum(count_of(tx, node), 1), params)
    return ChainState(rate, moments)


def _has(node: Any, field: str) -> bool:
    return field in getattr(node, "_fields", ())  # every tuple has a method `count`


def _parts(part: Any) -> Any:
    """What a transformation is made of: a tuple, a stage, another transformation, or None."""
    if type(part) is tuple or isinstance(part, Stage):
        return part
    chain = chain_of(part)
    return chain and chain.structure


def _names(part: Any) -> list[str]:
    made_of = _parts(part)
    if isinstance(made_of, Stage):
        return [made_of.name]
    parts = made_of if type(made_of) is tuple else () if made_of is None else (made_of,)
    return [name for inner in parts for name in _names(inner)]


def _is_state_of(part: Any, node: Any) -> bool:
    made_of = _parts(part)
    if type(made_of) is tuple:
        return (
            type(node) is tuple
            and len(node) == len(made_of)
            and all(map(_is_state_of, made_of, node))
        )
    if isinstance(made_of, Stage):
        # No rate is kept that is given as an array, which a stand-in's tx does not know.
        empty = (EmptyState, counted(EmptyState))
        return isinstance(node, (*made_of.states, *empty) if made_of.start else made_of.states)
    return made_of is None or _is_state_of(made_of, node)


def _stages(
    part: Any, node: Any, params: dict[str, Any] | None = None
) -> Iterator[tuple[Stage, Any]]:
    """The stages, and the state of each; where parameters are given, not packed."""
    made_of = _parts(part)
    if isinstance(made_of, Stage):
        yield made_of, node
    elif type(made_of) is tuple:
        packed = packed_chain_of(part)
        if params is not None and packed is not None:
            node = packed.repacked(node, _params_of(node, params))
        for inner, own in zip(made_of, node, strict=True):
            yield from _stages(inner, own, params)
    elif made_of is not None:
        yield from _stages(made_of, node, params)


def _params_of(node: Any, params: dict[str, Any]) -> PyTree:
    """The parameters as the tree that a packed state is of: without those that were masked."""
    fields = jax.tree.leaves(node, is_leaf=lambda part: isinstance(part, Packed))
    packed = next(field for field in fields if isinstance(field, Packed))
    paths, treedef = jax.tree.flatten_with_path(packed.leaves, is_leaf=lambda leaf: leaf is None)
    return treedef.unflatten([params[path_name(path)] for path, _ in paths])


def _moments(
    stage: Stage, state: Any, count: jax.Array, params: dict[str, Any]
) -> dict[str, Moments]:
    """The moments of every leaf that the state has some of."""
    kept = {path_name(path): (parts, scales) for path, parts, scales in kept_leaves(state)}
    names = sorted(kept)  # the order of a dictionary's leaves
    tree = {name: params[name] for name in names}
    fields = {field: {name: kept[name][0][field] for name in names} for field in stage.keeps}
    flat = state._replace(**fields)
    formats = choose_formats(stage.moments, tree)
    rows = kept_by_leaf(stage, flat, tree, formats)
    found: dict[str, Moments] = {}
    for name, format, row in zip(names, formats, rows, strict=True):
        mu, nu, *more = row[:-1] if format is None else decode(format, row)
        ratio = by_eps = None
        if stage.formula in _KNOWN:
            at = stage.scalars(count, state, {})[0][0]
            c1, c2, eps = bias(_decay(at.b1), count), bias(_decay(at.b2), count), at.eps
            second = (more or [nu])[0]
            if stage.formula is formulas.infinity_ratio:
                root, c2, by_eps = second, 1.0, second < 2 * eps
            else:
                root = jnp.sqrt(second)
                by_eps = root < eps
            ratio = jnp.abs(mu) / jnp.where(root == 0, 1, root) * (jnp.sqrt(c2) / c1)
        found[name] = Moments(mu, nu, ratio, by_eps, at_the_ends(format, row))
    return found


def _decay(shares: Shares) -> Decay:
    return Decay(shares, jnp.log1p(jnp.negative(shares.complement)))
