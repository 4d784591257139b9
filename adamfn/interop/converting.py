"""`convert`: moments of one format in another."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.core.leaf import as_fields, decode, encode, kept_by_leaf
from adamfn.core.stage import Stage, zeros
from adamfn.formats import Moments, check_moments, choose_formats
from adamfn.formats.arrangement import holds_moments, leaf_fields
from adamfn.interop.states import moment_states
from adamfn.trees import PyTree


def convert(state: PyTree, moments: Moments, to: Moments) -> PyTree:
    """Stores the moments of a running state in another format.

    Args:
      state: the state of a transformation of ours, by itself or in a chain or wrapper.
      moments: the format that it is in, as the `moments=` that made it.
      to: the format to go on in, likewise.

    Returns:
      The state, with the structure that `init` of the same transformation with `moments=to` gives.
      Codes are rounded to nearest. Counts and all else stay. It works under `jax.jit`, whose
      `out_shardings` say where scales are to lie.

    Raises:
      ValueError: no moments, packed ones, or not in the format `moments`: names the leaf.
      TypeError: no formats.

    >>> import adamfn
    >>> import jax.numpy as jnp
    >>> from adamfn.interop import convert
    >>> params = {"w": jnp.ones((64, 256))}
    >>> tx = adamfn.adam()
    >>> _, state = tx.update(params, tx.init(params))
    >>> state = convert(state, "float32", to="8bit")
    >>> print(state[0].count, state[0].mu["w"].dtype)
    1 int8
    >>> updates, state = adamfn.adam(moments="8bit").update(params, state)
    """
    check_moments(moments)
    check_moments(to)
    moment_states("convert: state", state)
    return jax.tree.map(
        lambda node: _converted(node, moments, to) if holds_moments(node) else node,
        state,
        is_leaf=holds_moments,
    )


def _converted(node: Any, moments: Moments, to: Moments) -> Any:
    kept = leaf_fields(node)
    if "scales" not in node._fields:
        raise ValueError(
            f"convert: found a {type(node).__name__}; expected a state of adamfn's, which has a"
            " field scales. adamfn.interop.optax.from_state makes one of optax's."
        )
    stage = Stage(
        "convert",
        jnp.negative,
        keeps=dict.fromkeys(kept, zeros),
        start=dict.fromkeys({*node._fields} - {*kept, "count", "scales"}),
        state=type(node),
        moments=moments,
    )
    leaves = jax.tree.map(_leaf, node.mu, node.nu, is_leaf=lambda part: part is None)
    before, after = choose_formats(moments, leaves), choose_formats(to, leaves)
    rows: list[Any] = []
    for row, old, new in zip(kept_by_leaf(stage, node, leaves, before), before, after, strict=True):
        exact = row if old is None else decode(old, row)
        rows.append(tuple(exact) if new is None else encode(new, exact, None))
    treedef = jax.tree.structure(leaves)
    return node._replace(**as_fields(replace(stage, moments=to), rows, treedef, after))


def _leaf(mu: Any, nu: Any) -> Any:
    """What a leaf was like, from what is kept of it: codes are of narrow leaves alone."""
    part = nu if mu is None else mu
    if part is None:
        return None
    wide = part.dtype if jnp.issubdtype(part.dtype, jnp.inexact) else jnp.dtype(jnp.float32)
    return jax.ShapeDtypeStruct(part.shape, wide)
