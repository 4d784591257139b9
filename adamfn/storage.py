"""Keeping a tree's moments in their formats: the first ones, and the way through a step.

A member's formula knows nothing of formats. It gets moments in float32, or wider where they are
kept as they are, and what it returns is stored again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamfn.formats import Format, get, noise
from adamfn.trees import (
    PyTree,
    Widened,
    check_inexact,
    describe,
    map_leaves,
    map_rows,
    matching_leaves,
    path_name,
    real_dtype,
    wide_dtype,
)

Moments: TypeAlias = str | Format | Callable[[str, Any], str | Format]
"""How moments are stored: a format's name, a format, or a function that chooses one for each leaf
from its path, such as `layers/0/kernel`, and the leaf: the parameter at `init` and its gradient at
`update`, so path and shape are to decide."""


def check_moments(moments: Any) -> Moments:
    """Returns `moments` if it can be one.

    Raises:
      TypeError, ValueError: it is no name, format or function.
    """
    if not callable(moments) or isinstance(moments, type):
        get(moments)
    return cast("Moments", moments)


def zero_moments(
    name: str, params: PyTree, moments: Moments = "float32", *, rows_rest: bool = False
) -> tuple[PyTree, PyTree]:
    """Both moments before the first step, stored.

    Args:
      name: the transformation that asks, for error messages.
      params: any pytree of floating-point or complex arrays.
      moments: how they are stored.
      rows_rest: whether a row of a leaf must be stored apart from the others.

    Returns:
      mu and nu, trees of the parameters' structure. A leaf is zeros of the parameter's shape in
      float32 at least, nu's real, or what the leaf's format stores.

    Raises:
      TypeError: a leaf is not an array of floating-point or complex numbers.
      ValueError: rows cannot rest in a leaf's format.
    """
    check_inexact(params, f"{name}: params")
    leaves, treedef = jax.tree.flatten(params)
    stored = [
        _zeros(leaf) if format is None else _stored_zeros(format, jnp.shape(leaf))
        for leaf, format in zip(leaves, choose_formats(moments, params), strict=True)
    ]
    if rows_rest:
        for (path, leaf), pair in zip(jax.tree.leaves_with_path(params), stored, strict=True):
            if any(part.shape[:-1] != jnp.shape(leaf)[:-1] for part in jax.tree.leaves(pair)):
                where = path_name(path) or "the root"
                raise ValueError(
                    f"{name}: the format of the leaf at {where} stores several rows in one number;"
                    " expected one in which a row can keep its moments, such as 'bfloat16' or"
                    " '8bit'."
                )
    return (
        treedef.unflatten([mu for mu, _ in stored]),
        treedef.unflatten([nu for _, nu in stored]),
    )


def step_moments(
    name: str,
    formula: Callable[..., tuple[jax.Array, ...]],
    updates: PyTree,
    kept: Mapping[str, PyTree],
    scalars: Sequence[PyTree],
    moments: Moments = "float32",
    count: chex.Numeric = 0,
    *,
    rows_rest: bool = False,
) -> tuple[PyTree, ...]:
    """Applies a member's formula to every leaf's gradient and moments.

    Args:
      name: the transformation that asks, for error messages.
      formula: `(g, *moments, *scalars) -> (u, *moments)` for one leaf, a function of a module.
      updates: the gradients.
      kept: what is kept of them by name: `mu`, `nu`, and any more that are stored as nu.
      scalars: what is the same for all leaves.
      moments: how they are stored.
      count: the step, for the noise of stochastic rounding.
      rows_rest: whether rows whose moments the formula leaves as they are stay as they are stored.

    Returns:
      The updates, then the next moments in their order.

    Raises:
      TypeError, ValueError: gradients or moments that do not fit, by the leaf's name.
    """
    check_inexact(updates, f"{name}: updates")
    formats = choose_formats(moments, updates)
    real = [field for field in kept if field != "mu"]
    way_out = "Pass gradients of the parameters that `init` was given, or call `init` again."
    if not any(formats):
        trees = {"updates": updates, **kept}
        return map_leaves(formula, trees, scalars, caller=name, magnitudes=real, way_out=way_out)
    leaves, treedef = jax.tree.flatten(updates)
    decoded = {
        field: as_decoded(name, field, updates, formats, tree) for field, tree in kept.items()
    }
    matching_leaves({"updates": updates, **decoded}, name, real, way_out)
    rows = list(zip(leaves, *map(treedef.flatten_up_to, kept.values()), strict=True))
    results: list[tuple[PyTree, ...]] = [()] * len(rows)
    for format in set(formats):
        chosen = [index for index, own in enumerate(formats) if own == format]
        if format is None:
            found = map_rows(Widened(formula, len(rows[0])), [rows[i] for i in chosen], scalars)
        else:
            step = _Stored(formula, format, len(kept), rows_rest)
            numbered = [(np.uint32(index), *rows[index]) for index in chosen]
            found = map_rows(step, numbered, (count, *scalars))
        for index, row in zip(chosen, found, strict=True):
            results[index] = row
    return tuple(treedef.unflatten(column) for column in zip(*results, strict=True))


@dataclass(frozen=True)
class _Stored:
    """A formula of one leaf's gradient and moments, between decoding and encoding."""

    formula: Callable[..., tuple[jax.Array, ...]]
    format: Format
    number: int
    """How many moments there are."""
    rows_rest: bool

    def __call__(self, leaf: jax.Array, g: jax.Array, *arguments: PyTree) -> tuple[PyTree, ...]:
        (first, second, *more), (count, *scalars) = (
            arguments[: self.number],
            arguments[self.number :],
        )
        nothing = jax.tree.map(jnp.zeros_like, first)
        mu, nu = self.format.decode(first, second)
        others = [self.format.decode(nothing, stored)[1] for stored in more]
        scalars = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), scalars)
        u, next_mu, next_nu, *others = self.formula(
            g.astype(jnp.float32), mu, nu, *others, *scalars
        )
        stored = self.format.encode(next_mu, next_nu, noise(count, leaf, g.shape))
        if self.rows_rest:
            moved = (next_mu != mu) | (next_nu != nu)
            moved = jnp.any(moved, axis=-1, keepdims=True) if moved.ndim else moved
            stored = jax.tree.map(partial(jnp.where, moved), stored, (first, second))
        # To nearest: noise would make a maximum climb.
        others = [self.format.encode(jnp.zeros_like(x), x, None)[1] for x in others]
        return u.astype(g.dtype), *stored, *others


def choose_formats(moments: Moments, tree: PyTree) -> list[Format | None]:
    """The format of every leaf; None for what is kept in float32 or wider."""
    if isinstance(moments, str) and moments == "float32":
        return [None] * len(jax.tree.leaves(tree))
    chosen: list[Format | None] = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        own = moments
        if callable(moments):
            own = moments(path_name(path), leaf)
        format = get(own)
        exact = format == get("float32") or not format.holds(jnp.shape(leaf), jnp.result_type(leaf))
        chosen.append(None if exact else format)
    return chosen


def _zeros(leaf: Any) -> tuple[jax.Array, jax.Array]:
    wide = wide_dtype(jnp.result_type(leaf))
    return jnp.zeros_like(leaf, wide), jnp.zeros_like(leaf, real_dtype(wide))


def _stored_zeros(format: Format, shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
    return jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), _spec(format, shape))


@cache
def _spec(format: Format, shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
    """The shapes and dtypes of what a format stores of a leaf."""
    moment = jax.ShapeDtypeStruct(shape, jnp.float32)
    noise = jax.ShapeDtypeStruct(shape, jnp.uint32)
    return jax.eval_shape(format.encode, moment, moment, noise)


def as_decoded(
    name: str, field: str, updates: PyTree, formats: Sequence[Format | None], tree: PyTree
) -> PyTree:
    """A tree of moments with the shapes of what its leaves decode to.

    Raises:
      ValueError: a leaf is not stored in its format.
    """
    leaves, treedef = jax.tree.flatten(updates)
    try:
        parts = treedef.flatten_up_to(tree)
    except (TypeError, ValueError):  # another structure: the comparison to come says where
        return jax.tree.map(
            lambda part: part.codes if hasattr(part, "codes") else part,
            tree,
            is_leaf=lambda part: hasattr(part, "codes"),
        )
    decoded: list[Any] = []
    paths = [path for path, _ in jax.tree.leaves_with_path(updates)]
    for path, leaf, format, part in zip(paths, leaves, formats, parts, strict=True):
        if format is None:
            expected, fits = f"an array of shape {np.shape(leaf)}", jax.tree_util.all_leaves([part])
            decoded.append(part)
        else:
            spec = _spec(format, leaf.shape)[0 if field == "mu" else 1]
            expected = _describe_stored(spec)
            fits = _describe_stored(part) == expected
            decoded.append(jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
        if not fits:
            where = path_name(path) or "the root"
            raise ValueError(
                f"{name}: {field} at {where} is stored as {_describe_stored(part)};"
                f" expected {expected}, for {describe(leaf)} and the moments= of this"
                " transformation. Pass gradients of the parameters that `init` was given, and a"
                " state that was made with the same moments=."
            )
    return treedef.unflatten(decoded)


def _describe_stored(part: PyTree) -> str:
    if jax.tree_util.all_leaves([part]):
        return describe(part)
    return f"{type(part).__name__}({', '.join(map(describe, jax.tree.leaves(part)))})"
