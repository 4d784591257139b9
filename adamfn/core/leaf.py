"""What a stage keeps of every leaf: the first of it, checked parts of a state, and a state again.

What has the leaf's shape stands under the leaf's path; what has not stands in `scales`, which has
an entry for each leaf in their order, or is empty if no leaf needs one. An entry has the scales of
the two moments, then those of each further one.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.core.placement import zeros_beside
from adamfn.core.stage import Stage
from adamfn.formats import Format, Stored, choose_formats
from adamfn.trees import (
    PyTree,
    describe,
    has_shape_of,
    matching_leaves,
    path_name,
    raise_mismatch,
)

Kept = tuple[Any, ...]
"""What one stage keeps of one leaf: an array or None for each field, then the entry of scales."""

_WAY_OUT = (
    "Pass gradients of the parameters that `init` was given. adamfn.interop has `restore` for a"
    " state that lost its containers, `carry_over` for a model that has grown."
)


def first_kept(stage: Stage, params: PyTree) -> dict[str, PyTree]:
    """What a stage keeps before the first step, by the fields of its state.

    Raises:
      ValueError: rows cannot rest in a leaf's format.
    """
    leaves, treedef = jax.tree.flatten(params)
    formats = choose_formats(stage.moments, params)
    rows = [
        tuple(begin(leaf) for begin in stage.keeps.values())
        if format is None
        else jax.tree.map(
            lambda part, leaf=leaf: zeros_beside(leaf, part), _spec(stage, format, leaf)
        )
        for leaf, format in zip(leaves, formats, strict=True)
    ]
    if stage.rests:
        for (path, leaf), row in zip(jax.tree.leaves_with_path(params), rows, strict=True):
            if any(part.shape[:-1] != jnp.shape(leaf)[:-1] for part in jax.tree.leaves(row)):
                raise ValueError(
                    f"{stage.name}: the format of the leaf at {path_name(path) or 'the root'}"
                    " stores several rows in one number; expected one in which a row can keep its"
                    " moments, such as 'bfloat16' or '8bit'."
                )
    return as_fields(stage, rows, treedef, formats)


def kept_by_leaf(
    stage: Stage, state: Any, updates: PyTree, formats: Sequence[Format | None]
) -> list[Kept]:
    """What a state keeps of every leaf.

    Raises:
      TypeError, ValueError: it is not of these leaves, or not in these formats; names the leaf.
    """
    name = f"{stage.name}: updates"
    if stage.whole is not None:
        columns = [_corrections(stage, state, updates, field) for field in stage.keeps]
        return list(zip(*columns, strict=True)) or [()] * len(formats)
    narrow = stage.has_moments and _any_is_narrow([getattr(state, field) for field in stage.keeps])
    if not any(formats) and not narrow and not jax.tree.leaves(getattr(state, "scales", ())):
        columns = [
            matching_leaves(
                name,
                updates,
                field,
                getattr(state, field),
                _WAY_OUT,
                _FITS.get(field, has_shape_of),
            )
            for field in stage.keeps
        ]
        return list(zip(*columns, strict=True)) or [()] * len(formats)
    leaves, treedef = jax.tree.flatten(updates)
    fields: list[list[Any]] = []
    for field in stage.keeps:
        try:
            fields.append(treedef.flatten_up_to(getattr(state, field)))
        except (TypeError, ValueError):
            raise_mismatch(name, updates, field, getattr(state, field), has_shape_of, _WAY_OUT)
    scales: Any = state.scales
    if not isinstance(scales, tuple) or len(scales) != len(leaves):  # pyright: ignore[reportUnknownArgumentType]
        scales = [()] * len(leaves)  # the comparison to come says where one is missing
    rows: list[Kept] = []
    paths = [path for path, _ in jax.tree.leaves_with_path(updates)]
    for path, leaf, format, entry, *parts in zip(
        paths, leaves, formats, scales, *fields, strict=True
    ):
        if format is None:
            expected = tuple(jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32) for _ in parts)
            row = tuple(parts)
            fits = all(has_shape_of(leaf, part) and hasattr(part, "dtype") for part in parts)
            fits = fits and all(jnp.issubdtype(part.dtype, jnp.inexact) for part in parts)
            fits = fits and not (stage.has_moments and _any_is_narrow(parts))
        else:
            expected = _spec(stage, format, leaf)
            row = (*parts, entry if jax.tree.leaves(expected[-1]) else expected[-1])
            fits = _described(row) == _described(expected)
        if not fits:
            fields_of = [*stage.keeps, "scales"]
            found, wanted = zip(
                *(
                    (f"{field} {_described(a)}", f"{field} {_described(b)}")
                    for field, a, b in zip(fields_of, row, expected, strict=False)
                    if _described(a) != _described(b)
                ),
                strict=True,
            )
            raise ValueError(
                f"{stage.name}: at {path_name(path) or 'the root'} the state has"
                f" {', '.join(found)}; expected {', '.join(wanted)}, for {describe(leaf)} and the"
                " moments= of this transformation. Pass gradients of the parameters that `init` was"
                " given, and a state that was made with the same moments=."
            )
        rows.append(row)
    return rows


def _any_is_narrow(moments: PyTree) -> bool:
    """Whether some moments have fewer bits than float32, as a state that was cast has."""
    dtypes = (getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(moments))
    return any(dtype is not None and dtype.itemsize < 4 for dtype in dtypes)


def _corrections(stage: Stage, state: Any, updates: PyTree, field: str) -> list[Any]:
    """What is kept of each leaf beside a parameter, None of some."""
    leaves, treedef = jax.tree.flatten(updates)
    try:
        parts: list[Any] = treedef.flatten_up_to(getattr(state, field))
    except (TypeError, ValueError):
        parts = [0] * len(leaves)  # said below
    for (path, leaf), part in zip(jax.tree.leaves_with_path(updates), parts, strict=True):
        if part is not None and not (hasattr(part, "dtype") and has_shape_of(leaf, part)):
            raise ValueError(
                f"{stage.name}: at {path_name(path) or 'the root'} the state's {field} is"
                f" {describe(part)}; expected one of the shape of {describe(leaf)}. {_WAY_OUT}"
            )
    return parts


def check_whole(
    stages: Sequence[Stage], masks: Sequence[Sequence[bool]], updates: PyTree, kept: Sequence[Any]
) -> None:
    """Checks that what makes parameters whole is kept of those that need it, and of no others.

    Raises:
      ValueError: it is not; names the leaf.
    """
    for place, (stage, mask) in enumerate(zip(stages, masks, strict=True)):
        if stage.whole is None or not stage.keeps:
            continue
        paths = jax.tree.leaves_with_path(updates)
        for (path, _), active, row in zip(paths, mask, kept, strict=True):
            if active == (row[place][0] is None):
                found, wanted = ("no", "bfloat16") if active else ("a", "float32 or wider")
                raise ValueError(
                    f"{stage.name}: at {path_name(path) or 'the root'} the state has {found}"
                    f" correction, and the parameter is {wanted}; expected corrections of bfloat16"
                    " parameters alone. Make the state with init of these parameters, and carry"
                    " weights over with adamfn.whole_weights and adamfn.narrow_weights."
                )


def as_fields(
    stage: Stage, rows: Sequence[Kept], treedef: Any, formats: Sequence[Format | None]
) -> dict[str, PyTree]:
    """What is kept of every leaf as the fields of a stage's state."""
    fields = {
        field: treedef.unflatten([row[place] for row in rows])
        for place, field in enumerate(stage.keeps)
    }
    if "scales" not in stage.state._fields:
        return fields
    entries = [row[-1] if format else () for row, format in zip(rows, formats, strict=True)]
    if not rows and stage.moments != "float32":
        # One leaf instead of a tuple: optax.tree.map_params makes the state of a tree without
        # leaves, and holds it beside a state that has an entry for each.
        return {**fields, "scales": jnp.zeros((0,))}
    return {**fields, "scales": tuple(entries) if jax.tree.leaves(entries) else ()}


def decode(stage_format: Format, kept: Kept) -> list[jax.Array]:
    """The moments that are kept of a leaf: mu, nu and any more."""
    mu, nu, *more, (scales, *more_scales) = kept
    moments = [*stage_format.decode(Stored(mu, nu, scales))]
    for codes, own in zip(more, more_scales, strict=True):
        nothing = jax.tree.map(jnp.zeros_like, mu)
        moments.append(stage_format.decode(Stored(nothing, codes, own))[1])
    return moments


def encode(stage_format: Format, moments: Sequence[jax.Array], noise: Any) -> Kept:
    """The inverse of `decode`, rounded with noise."""
    mu, nu, *more = moments
    stored = stage_format.encode(mu, nu, noise)
    # Any more to nearest: noise would make a maximum climb.
    others = [stage_format.encode(jnp.zeros_like(x), x, None) for x in more]
    scales = (stored.scales, *(other.scales for other in others))
    return stored.mu, stored.nu, *(other.nu for other in others), scales


def _spec(stage: Stage, format: Format, leaf: Any) -> Kept:
    return _spec_of(len(stage.keeps), format, np.shape(leaf))


@cache
def _spec_of(moments: int, format: Format, shape: tuple[int, ...]) -> Kept:
    """The shapes and dtypes of what is kept of a leaf in a format."""
    moment = jax.ShapeDtypeStruct(shape, jnp.float32)
    noise = jax.ShapeDtypeStruct(shape, jnp.uint32)
    return jax.eval_shape(lambda x, noise: encode(format, [x] * moments, noise), moment, noise)


def _described(part: PyTree) -> str:
    if part is None or jax.tree_util.all_leaves([part]):
        return describe(part)
    return f"({', '.join(map(describe, jax.tree.leaves(part)))})"


def _mu_fits(g: Any, mu: Any) -> bool:
    # A complex number would lose its imaginary part on its way into a real leaf.
    return has_shape_of(g, mu) and jnp.iscomplexobj(g) == jnp.iscomplexobj(mu)


_FITS = {"mu": _mu_fits}
