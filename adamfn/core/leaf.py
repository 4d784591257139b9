# SPDX-License-Identifier: Apache-2.0
"""The state of each leaf: its first value, its place in the states of stages, and its checks.

Arrays of the leaf's shape stand under the leaf's path in their field, None where a format has no
codes for a moment. Scales stand in `scales`, a dictionary from the leaf's path to those of the two
moments, then of each further one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamfn.core.placement import Shards, on_mesh_of, zeros_beside
from adamfn.core.stage import Stage
from adamfn.core.weights import Weights
from adamfn.formats import Format, Stored, choose_formats
from adamfn.formats.arrangement import scales_key
from adamfn.trees import (
    PyTree,
    described,
    has_shape_of,
    path_name,
    raise_mismatch,
    real_dtype,
    wide_dtype,
)

_REPACK = "adamfn.repack converts the state of a packed chain into that of a plain one, and back."

Kept = tuple[Any, ...]
"""The state of one leaf for one stage: an array or None for each field, then any scales."""

_WAY_OUT = (
    "Pass gradients of the parameters that `init` was given. adamfn.interop has `restore` for a"
    " state that lost its containers, `carry_over` for a model that has grown."
)


@dataclass
class Leaf:
    """One leaf on its way through a run of stages."""

    path: Any
    index: int  # its place in the tree, from which its random bits are made
    grad: Any  # what the run was given: a gradient, or an update of parts before it
    param: Any  # None if `update` was given none; if no stage reads it, only its dtype is used
    formats: list[Format | None] = field(default_factory=list[Any])  # of its moments, by stage
    kept: list[Kept] = field(default_factory=list[Any])  # its state, by stage
    active: list[bool] = field(default_factory=list[bool])  # by stage: whether it changes this leaf
    shards: Shards | None = None  # how it is split over a mesh for its step
    seen: Any = None  # the gradient that its moments were given
    update: Any = None  # the gradient at first, then the update of the segments so far
    program: Any = None  # of the current segment

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
    def held(self) -> Any:
        """The parameter, by whose dtype a format is chosen, or else the gradient."""
        known = self.param is not None and has_shape_of(self.param, self.grad)
        return self.param if known else self.grad

    @property
    def name(self) -> str:
        """Its path, as messages name it."""
        return path_name(self.path) or "the root"


def first_fields(stage: Stage, params: PyTree) -> dict[str, PyTree]:
    """The arrays that a stage keeps before the first step, by the fields of its state."""

    def first(leaf: Any, format: Format | None) -> Kept:
        with on_mesh_of(leaf):
            if format is None:
                return tuple(begin(leaf) for begin in stage.keeps.values())
            spec = _spec(tuple(stage.keeps), format, np.shape(leaf))
            return jax.tree.map(lambda part: zeros_beside(leaf, part), spec)

    leaves, treedef = jax.tree.flatten_with_path(params)
    formats = choose_formats(stage.moments, params)
    rows = [first(leaf, format) for (_, leaf), format in zip(leaves, formats, strict=True)]
    return as_fields(stage, rows, treedef, [path for path, _ in leaves])


def kept_by_leaf(
    stage: Stage, state: Any, updates: PyTree, formats: Sequence[Format | None]
) -> list[Kept]:
    """The state of every leaf for one stage.

    Raises:
      ValueError: it is not of these leaves, or not in these formats; names the leaf.
    """
    name, (leaves, treedef) = f"{stage.name}: updates", jax.tree.flatten_with_path(updates)
    given: Any = getattr(state, "scales", None)
    scales: dict[str, Any] = given if isinstance(given, dict) else {}
    columns: list[list[Any]] = []
    for part in stage.keeps:
        field = getattr(state, part)
        try:
            columns.append(treedef.flatten_up_to(field))
        except (TypeError, ValueError):
            packed = hasattr(field, "buffers") != hasattr(updates, "buffers")
            way_out = _REPACK if packed else _WAY_OUT
            raise_mismatch(name, updates, part, field, has_shape_of, way_out)
    rows: list[Kept] = []
    for (path, leaf), format, *parts in zip(leaves, formats, *columns, strict=True):
        for part, x in zip(stage.keeps, parts, strict=True) if format is None else ():
            fits = partial(_fits, stage, part)
            if not fits(leaf, x):
                raise_mismatch(name, updates, part, getattr(state, part), fits, _WAY_OUT)
        entry = scales.get(scales_key(path), ()) if scales else ()  # names take long to make
        if format is None and not entry and (not stage.has_moments or all(map(_is_wide, parts))):
            rows.append(tuple(parts))
            continue
        expected = _spec(tuple(stage.keeps), format, np.shape(leaf))
        words = zip(_described(stage, (*parts, entry)), _described(stage, expected), strict=True)
        if differing := [pair for pair in words if pair[0] != pair[1]]:
            found, wanted = map(", ".join, zip(*differing, strict=True))
            raise ValueError(
                f"{stage.name}: at {path_name(path) or 'the root'} the state has {found}; expected"
                f" {wanted}, for {described(leaf)} and the moments= of this transformation. Pass"
                " gradients of the parameters that `init` was given, and a state that was made with"
                " the same moments=."
            )
        rows.append((*parts, entry or expected[-1]))
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
    scales = {
        scales_key(path): row[-1]
        for path, row in zip(paths, rows, strict=True)
        if len(row) > len(stage.keeps) and jax.tree.leaves(row[-1])
    }
    return {**fields, "scales": scales}


def check_corrections(stage: Stage, place: int, leaves: Sequence[Leaf]) -> None:
    """Checks that corrections are kept of bfloat16 parameters, and of no others.

    Raises:
      ValueError: they are not; names the leaf.
    """
    for leaf in leaves if stage.keeps and isinstance(stage.formula, Weights) else ():
        active, correction = leaf.active[place], leaf.kept[place][0]
        if active == (correction is None):
            found, wanted = ("no", "bfloat16") if active else ("a", "float32 or wider")
            raise ValueError(
                f"{stage.name}: at {leaf.name} the state has {found} correction, and the parameter"
                f" is {wanted}; expected corrections of bfloat16 parameters alone. If it was"
                " bfloat16 before the last step, apply updates with adamfn.step, or"
                " adamfn.apply_updates: Equinox's makes it float32. Else make the state with init"
                " of these parameters, and carry weights over with adamfn.whole_weights and"
                " adamfn.narrow_weights."
            )


def decode(format: Format, fields: Sequence[str], kept: Kept) -> list[jax.Array]:
    """The moments of a leaf: mu, nu and any more.

    A further one whose name begins with mu is stored like mu, beside the same nu; others like nu.
    """
    mu, nu, *more, (scales, *more_scales) = kept
    moments = [*format.decode(Stored(mu, nu, scales))]
    for name, codes, own in zip(fields[2:], more, more_scales, strict=True):
        like_nu = not name.startswith("mu")
        zeros = jax.tree.map(jnp.zeros_like, mu)  # None if nu's place has the codes of both
        stored = Stored(zeros, codes, own) if like_nu or mu is None else Stored(codes, nu, own)
        moments.append(format.decode(stored)[like_nu])
    return moments


def encode(format: Format, fields: Sequence[str], moments: Sequence[Any], noise: Any) -> Kept:
    """The inverse of `decode`, rounded with noise."""
    mu, nu, *more = moments
    stored = format.encode(mu, nu, noise)
    codes, scales = [stored.mu, stored.nu], [stored.scales]
    for name, x in zip(fields[2:], more, strict=True):
        like_nu = not name.startswith("mu")  # to the nearest: noise would make a maximum climb
        operands = (jnp.zeros_like(x), x, None) if like_nu else (x, nu, noise)
        other = format.encode(*operands)
        codes.append(other.nu if like_nu or other.mu is None else other.mu)
        scales.append(other.scales)
    return *codes, tuple(scales)


@cache
def _spec(fields: tuple[str, ...], format: Format | None, shape: tuple[int, ...]) -> Kept:
    """The shapes and dtypes of a leaf's state in a format; None for float32."""
    moments = [jax.ShapeDtypeStruct(shape, jnp.float32)] * len(fields)
    if format is None:
        return *moments, ()
    noise = jax.ShapeDtypeStruct(shape, jnp.uint32)
    return jax.eval_shape(partial(encode, format, fields), moments, noise)


def _fits(stage: Stage, part: str, leaf: Any, x: Any) -> bool:
    """Whether an array may be part of a leaf's state in float32 or wider."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or isinstance(stage.formula, Weights):
        return x is None or (dtype is not None and has_shape_of(leaf, x))
    # A complex number would lose its imaginary part in a real leaf.
    codes = jnp.issubdtype(dtype, jnp.integer)
    alike = part != "mu" or codes or jnp.iscomplexobj(leaf) == jnp.iscomplexobj(x)
    inexact = stage.has_moments or bool(jnp.issubdtype(dtype, jnp.inexact))
    return has_shape_of(leaf, x) and inexact and alike


def _is_wide(moment: Any) -> bool:
    # Codes, and moments after a cast of the state, are not.
    dtype: Any = getattr(moment, "dtype", jnp.int8)
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize >= 4


def _described(stage: Stage, row: Kept) -> list[str]:
    """What an error calls each part of a leaf's state."""
    *parts, scales = row
    words = [*map(described, parts), f"({', '.join(map(described, jax.tree.leaves(scales)))})"]
    return [f"{field} {word}" for field, word in zip([*stage.keeps, "scales"], words, strict=True)]
