"""The state of each leaf: its first value, its place in the states of stages, and its checks.

Arrays of the leaf's shape stand under the leaf's path in their field; a format that has no codes
for a moment leaves an empty array of the leaf's rank there. Scales stand in `scales`, a dictionary
from the leaf's path to those of the two moments, then of each further one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.core.placement import Shards, zeros_beside
from adamfn.core.stage import Stage
from adamfn.core.weights import Weights
from adamfn.formats import Format, Stored, choose_formats
from adamfn.formats.arrangement import scales_key
from adamfn.trees import (
    PyTree,
    describe,
    has_shape_of,
    matching_leaves,
    path_name,
    raise_mismatch,
    real_dtype,
    wide_dtype,
)

Kept = tuple[Any, ...]
"""The state of one leaf for one stage: an array for each field, then the scales."""

_WAY_OUT = (
    "Pass gradients of the parameters that `init` was given. adamfn.interop has `restore` for a"
    " state that lost its containers, `carry_over` for a model that has grown."
)


@dataclass
class Leaf:
    """One leaf on its way through a run of stages."""

    path: Any
    index: int
    """Its place in the tree. Its random bits are made from it."""
    grad: Any
    """The gradient that the run was given."""
    param: Any
    """None if no stage reads the parameters."""
    formats: list[Format | None] = field(default_factory=list[Any])
    """The format of its moments, for each stage."""
    kept: list[Kept] = field(default_factory=list[Any])
    """Its state for each stage."""
    active: list[bool] = field(default_factory=list[bool])
    """Whether each stage's mask has it."""
    shards: Shards | None = None
    """How it is split over a mesh for its step."""
    seen: Any = None
    """The gradient that its moments were given."""
    update: Any = None
    """The gradient at first, then the update of the segments so far."""

    def __post_init__(self) -> None:
        """The gradient is the first update."""
        self.seen = self.update = self.grad

    @cached_property
    def dtype(self) -> Any:
        """The real dtype that its programs compute in: the widest, and float32 at least."""
        arrays = jax.tree.leaves((self.grad, self.param, self.kept))
        dtypes = {x.dtype for x in arrays if hasattr(x, "dtype")}
        inexact = [real_dtype(wide_dtype(x)) for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
        return max(inexact, key=lambda dtype: dtype.itemsize)

    @property
    def name(self) -> str:
        """Its path, as messages name it."""
        return path_name(self.path) or "the root"


def first_fields(stage: Stage, params: PyTree) -> dict[str, PyTree]:
    """The arrays that a stage keeps before the first step, by the fields of its state."""

    def first(leaf: Any, format: Format | None) -> Kept:
        if format is None:
            return (*(begin(leaf) for begin in stage.keeps.values()), ())
        expected = _as_stored(stage, format, leaf)
        return jax.tree.map(lambda part: zeros_beside(leaf, part), expected)

    leaves, treedef = jax.tree.flatten_with_path(params)
    formats = choose_formats(stage.moments, params)
    rows = [first(leaf, format) for (_, leaf), format in zip(leaves, formats, strict=True)]
    return as_fields(stage, rows, treedef, [path for path, _ in leaves])


def kept_by_leaf(
    stage: Stage, state: Any, updates: PyTree, formats: Sequence[Format | None]
) -> list[Kept]:
    """The state of every leaf for one stage.

    Raises:
      TypeError, ValueError: it is not of these leaves, or not in these formats; names the leaf.
    """
    name, leaves = f"{stage.name}: updates", jax.tree.leaves_with_path(updates)
    columns = [getattr(state, field) for field in stage.keeps]
    if isinstance(stage.formula, Weights):
        return _rows([_corrections(stage, column, updates) for column in columns], len(formats))
    scales: Any = getattr(state, "scales", {})
    lean = any(formats) or bool(jax.tree.leaves(scales))
    if not lean and not (stage.has_moments and _any_is_narrow(columns)):
        fields = [
            matching_leaves(name, updates, kept, column, _WAY_OUT, _FITS.get(kept, has_shape_of))
            for kept, column in zip(stage.keeps, columns, strict=True)
        ]
        return _rows(fields, len(formats))
    treedef, flat = jax.tree.structure(updates), list[list[Any]]()
    for kept, column in zip(stage.keeps, columns, strict=True):
        try:
            flat.append(treedef.flatten_up_to(column))
        except (TypeError, ValueError):
            raise_mismatch(name, updates, kept, column, has_shape_of, _WAY_OUT)
    entries: Mapping[str, Any] = cast("Any", scales) if isinstance(scales, dict) else {}
    rows: list[Kept] = []
    for (path, leaf), format, *parts in zip(leaves, formats, *flat, strict=True):
        row = (*parts, entries.get(scales_key(path), ()))
        expected = _as_stored(stage, format, leaf)
        if not _fits(stage, format, leaf, row, expected):
            raise ValueError(
                f"{stage.name}: at {path_name(path) or 'the root'} the state has"
                f" {_differing(stage, row, expected)}; expected"
                f" {_differing(stage, expected, row)}, for {describe(leaf)} and the moments= of"
                " this transformation. Pass gradients of the parameters that `init` was given, and"
                " a state that was made with the same moments=."
            )
        rows.append(row)
    return rows


def as_fields(
    stage: Stage, rows: Sequence[Kept], treedef: Any, paths: Sequence[Any]
) -> dict[str, PyTree]:
    """The state of every leaf as the fields of a stage's state; the inverse of `kept_by_leaf`."""
    fields = {
        field: treedef.unflatten([row[place] for row in rows])
        for place, field in enumerate(stage.keeps)
    }
    if "scales" not in stage.state._fields:
        return fields
    if not rows and stage.moments != "float32":
        # A leaf instead of a dictionary: optax.tree.map_params makes the state of a tree without
        # leaves, and holds it beside a state that has entries.
        return {**fields, "scales": jnp.zeros((0,))}
    entries = zip(paths, rows, strict=True)
    scales = {scales_key(path): row[-1] for path, row in entries if jax.tree.leaves(row[-1])}
    return {**fields, "scales": scales}


def without_empty(stage: Stage, format: Format | None, leaf: Any, row: Kept) -> Kept:
    """The state of a leaf as its program takes it: None where its format has no codes."""
    if format is None:
        return row[: len(stage.keeps)]
    *spec, scales = _spec(stage, format, leaf)
    parts = (None if part is None else x for x, part in zip(row, spec, strict=False))
    return (*parts, row[-1] if jax.tree.leaves(scales) else scales)


def with_empty(new: Kept, old: Kept) -> Kept:
    """The inverse of `without_empty`: the next state, with the empty arrays of the old one."""
    return tuple(b if a is None else a for a, b in zip((*new, ()), old, strict=False))


def check_corrections(stage: Stage, place: int, leaves: Sequence[Leaf]) -> None:
    """Checks that corrections are kept of bfloat16 parameters, and of no others.

    Raises:
      ValueError: they are not; names the leaf.
    """
    for leaf in leaves if stage.keeps and isinstance(stage.formula, Weights) else ():
        active, correction = leaf.active[place], leaf.kept[place][0]
        if jnp.ndim(correction) and active != has_shape_of(correction, leaf.grad):
            found, wanted = ("no", "bfloat16") if active else ("a", "float32 or wider")
            raise ValueError(
                f"{stage.name}: at {leaf.name} the state has {found} correction, and the parameter"
                f" is {wanted}; expected corrections of bfloat16 parameters alone. Make the state"
                " with init of these parameters, and carry weights over with adamfn.whole_weights"
                " and adamfn.narrow_weights."
            )


def decode(format: Format, kept: Kept) -> list[jax.Array]:
    """The moments of a leaf: mu, nu and any more."""
    mu, nu, *more, (scales, *more_scales) = kept
    moments = [*format.decode(Stored(mu, nu, scales))]
    for codes, own in zip(more, more_scales, strict=True):
        nothing = jax.tree.map(jnp.zeros_like, mu)
        moments.append(format.decode(Stored(nothing, codes, own))[1])
    return moments


def encode(format: Format, moments: Sequence[jax.Array], noise: Any) -> Kept:
    """The inverse of `decode`, rounded with noise."""
    mu, nu, *more = moments
    stored = format.encode(mu, nu, noise)
    # Further moments go to the nearest: noise would make a maximum climb.
    others = [format.encode(jnp.zeros_like(x), x, None) for x in more]
    scales = (stored.scales, *(other.scales for other in others))
    return stored.mu, stored.nu, *(other.nu for other in others), scales


def _rows(columns: Sequence[Sequence[Any]], leaves: int) -> list[Kept]:
    return [(*row, ()) for row in zip(*columns, strict=True)] or [((),)] * leaves


def _corrections(stage: Stage, column: PyTree, updates: PyTree) -> list[Any]:
    leaves, treedef = jax.tree.flatten_with_path(updates)
    try:
        parts: list[Any] = treedef.flatten_up_to(column)
    except (TypeError, ValueError):
        parts = [None] * len(leaves)  # the error below names a leaf
    for (path, leaf), part in zip(leaves, parts, strict=True):
        empty = getattr(part, "shape", None) == (0,) * jnp.ndim(leaf)
        if not (hasattr(part, "dtype") and (empty or has_shape_of(leaf, part))):
            raise ValueError(
                f"{stage.name}: at {path_name(path) or 'the root'} the state's correction is"
                f" {describe(part)}; expected one of the shape of {describe(leaf)}. {_WAY_OUT}"
            )
    return parts


def _spec(stage: Stage, format: Format, leaf: Any) -> Kept:
    return _spec_of(len(stage.keeps), format, np.shape(leaf))


@cache
def _spec_of(moments: int, format: Format, shape: tuple[int, ...]) -> Kept:
    """The shapes and dtypes of a leaf's state in a format."""
    moment = jax.ShapeDtypeStruct(shape, jnp.float32)
    noise = jax.ShapeDtypeStruct(shape, jnp.uint32)
    return jax.eval_shape(lambda x, noise: encode(format, [x] * moments, noise), moment, noise)


def _as_stored(stage: Stage, format: Format | None, leaf: Any) -> Kept:
    """The shapes and dtypes of a leaf's state as its fields hold it."""
    if format is None:
        return (*[jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32)] * len(stage.keeps), ())
    *parts, scales = _spec(stage, format, leaf)
    nothing = jax.ShapeDtypeStruct((0,) * np.ndim(leaf), jnp.int8)
    return (*(nothing if part is None else part for part in parts), scales)


def _fits(stage: Stage, format: Format | None, leaf: Any, row: Kept, expected: Kept) -> bool:
    if format is not None:
        return _described(row) == _described(expected)
    *parts, scales = row
    return (
        not jax.tree.leaves(scales)
        and all(has_shape_of(leaf, part) and hasattr(part, "dtype") for part in parts)
        and all(jnp.issubdtype(part.dtype, jnp.inexact) for part in parts)
        and not (stage.has_moments and _any_is_narrow(parts))
    )


def _differing(stage: Stage, row: Kept, other: Kept) -> str:
    fields = zip([*stage.keeps, "scales"], row, other, strict=True)
    return ", ".join(
        f"{field} {_described(a)}" for field, a, b in fields if _described(a) != _described(b)
    )


def _described(part: PyTree) -> str:
    if part is None or jax.tree_util.all_leaves([part]):
        return describe(part)
    return f"({', '.join(map(describe, jax.tree.leaves(part)))})"


def _any_is_narrow(moments: PyTree) -> bool:
    """Whether some moments have fewer bits than float32, as after a cast of the state."""
    dtypes = (getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(moments))
    return any(dtype is not None and dtype.itemsize < 4 for dtype in dtypes)


def _mu_fits(g: Any, mu: Any) -> bool:
    # A complex number would lose its imaginary part in a real leaf.
    return has_shape_of(g, mu) and jnp.iscomplexobj(g) == jnp.iscomplexobj(mu)


_FITS = {"mu": _mu_fits}
