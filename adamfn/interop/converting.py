# SPDX-License-Identifier: Apache-2.0
"""`convert`: moments of one format in another."""

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
      state: the state of an adamfn transformation, also inside a chain or a wrapper.
      moments: its format: the `moments=` that made it.
      to: the format to go on in, likewise.

    Returns:
      The state that the same transformation with `moments=to` goes on from. Codes are rounded to
      nearest. It works under `jax.jit`, whose `out_shardings` place the scales.

    Raises:
      ValueError: no moments, packed ones, or not in the format `moments`; names the leaf.
      TypeError: not a format.

    >>> import adamfn, jax.numpy as jnp
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
        lambda node: converted(node, moments, to) if holds_moments(node) else node,
        state,
        is_leaf=holds_moments,
    )


def converted(node: Any, moments: Moments, to: Moments) -> Any:
    """One state of moments, in another format."""
    if "scales" not in node._fields:
        raise ValueError(
            f"convert: found a {type(node).__name__}; expected a state of adamfn's, which has a"
            " field scales. adamfn.interop.optax.from_state converts a state of optax."
        )

    def shape(mu: Any, nu: Any) -> Any:
        """The shape of a leaf, and the dtype of its moments in float32."""
        part = nu if mu is None else mu
        if part is None:
            return None
        wide = part.dtype if jnp.issubdtype(part.dtype, jnp.inexact) else jnp.float32
        return jax.ShapeDtypeStruct(part.shape, wide)

    keeps = dict.fromkeys(leaf_fields(node), zeros)
    start = dict.fromkeys({*node._fields} - {*keeps, "count", "scales"})
    stage = Stage("convert", jnp.negative, keeps=keeps, start=start, state=type(node), moments=to)
    shapes = jax.tree.map(shape, node.mu, node.nu, is_leaf=lambda part: part is None)
    before, after = choose_formats(moments, shapes), choose_formats(to, shapes)
    rows: list[Any] = []
    for row, old, new in zip(kept_by_leaf(stage, node, shapes, before), before, after, strict=True):
        exact = row if old is None else decode(old, [*keeps], row)
        rows.append(tuple(exact) if new is None else encode(new, [*keeps], exact, None))
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    return node._replace(**as_fields(stage, rows, treedef, [path for path, _ in leaves]))
