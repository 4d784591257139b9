"""The program of a leaf: the formulas of joined stages, one after another.

It decodes what is kept of the leaf, applies the formulas, encodes again, and may move the parameter
at its end. Nothing between two stages is rounded or written to memory. Every backend runs calls of
programs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from adamfn.core import formulas
from adamfn.core.leaf import Kept, decode, encode
from adamfn.formats import Format, elements
from adamfn.formats.base import Seed, noise_at
from adamfn.formats.seeds import Seeds
from adamfn.trees import describe


@dataclass(frozen=True)
class Part:
    """What a program does for one stage; the fields are those of `Stage`."""

    name: str
    formula: Callable[..., Any]
    reads: tuple[str, ...]
    keeps: tuple[str, ...]
    """The names of what the stage keeps, which the formula is given."""
    format: Format | None
    """How they are stored; None for as they are."""
    rests: bool
    """Whether rows rest where the update that it is given is zero."""
    elementwise: bool
    active: bool
    """Whether the stage's mask has this leaf."""
    stacked: bool = False
    """Whether the leaf holds layers along its first axis, to each of which the formula applies."""
    holds: bool = False
    whole: Callable[..., jax.Array] | None = None
    mean: Callable[..., jax.Array] | None = None
    """What the formula needs the mean of; None for nothing, and where the mean is a scalar."""
    layered: bool = False
    """Whether the mean, its last scalar, is one for each layer."""

    @property
    def needs_mean(self) -> bool:
        """Whether a mean has to be found for the formula."""
        return self.active and self.mean is not None

    @property
    def local(self) -> bool:
        """Whether it can take a tile of a leaf by itself."""
        return self.elementwise and not self.needs_mean


@dataclass(frozen=True)
class Program:
    """The formulas of some stages for one leaf."""

    parts: tuple[Part, ...]
    scalars: Any
    """The structure of the scalars: a tuple of a tuple for each part."""
    dtype: Any
    """The real dtype that it computes in."""
    moves: bool
    """Whether it moves the parameter."""
    update_dtype: Any
    """The dtype of the update that it returns; None if it returns none."""
    measures: int | None = None
    """The part whose mean is to be found: what its formula returns is then all that it returns."""

    @property
    def reads_params(self) -> bool:
        """Whether it is given the parameter."""
        return self.moves or any("params" in part.reads for part in self.parts if part.active)

    @property
    def known(self) -> bool:
        """Whether all its formulas are the library's own."""
        return all(
            getattr(formula, "__module__", None) == formulas.__name__
            for part in self.parts
            for formula in (part.formula, part.mean or part.formula)
        )

    def __call__(
        self,
        seeds: Seeds,
        scalars: Sequence[jax.Array],
        g: jax.Array,
        p: jax.Array | None,
        kept: Sequence[Kept],
        numbers: jax.Array | None = None,
        moving: jax.Array | None = None,
    ) -> tuple[list[Kept], list[jax.Array]]:
        """Returns what is kept for each part, then the update and the parameter, if asked for.

        A program that measures keeps nothing, and returns what it is to take the mean of.

        Args:
          seeds: of the noise of stochastic rounding.
          scalars: the scalars of all parts, in the program's dtype.
          g: the gradient, or what stages before these made of it.
          p: the parameter; None if the program does not read it.
          kept: what is kept of the leaf for each part.
          numbers: of a shard or a tile of a leaf, the numbers that its elements have there,
            uint32 of g's shape; None for a whole leaf.
          moving: of a tile, whether its rows move, for the stage that lets others rest; None where
            it holds whole rows.
        """
        u = grad = _widened(g, self.dtype)
        stored_p = param = None if p is None else _widened(p, self.dtype)
        for part, old in zip(self.parts, kept, strict=True):
            if part.whole is not None and part.active:
                param = part.whole(stored_p, *old)
        known = {"params": param, "stored": stored_p, "grads": grad}

        def words(seed: Seed) -> jax.Array:
            return noise_at(seed, elements.numbers_of(g.shape) if numbers is None else numbers)

        next_kept: list[Kept] = []
        taken: jax.Array | None = None
        for place, (part, own, old) in enumerate(
            zip(self.parts, jax.tree.unflatten(self.scalars, scalars), kept, strict=True)
        ):
            if not part.active:
                next_kept.append(old)
                continue
            if "noise" in part.reads:
                known["noise"] = words(seeds.weights())
            read = [known[name] for name in part.reads]
            live = (
                [_widened(x, self.dtype) for x in old]
                if part.format is None
                else decode(part.format, old)
            )
            taken = own[0] if part.holds else taken
            returned = _applied(part, [u, *read, *live], own)
            if place == self.measures:
                return [], [returned.astype(self.dtype)]
            given, (u, *new) = u, _checked(part, u, live, returned)
            rows: Any = moving_rows(given) if part.rests and moving is None else moving
            if part.rests:
                u = jnp.where(rows, u, 0)
                new = [jnp.where(rows, a, b) for a, b in zip(new, live, strict=True)]
            known |= zip(part.keeps, new, strict=True)
            if part.format is None:
                stored: Kept = tuple(x.astype(was.dtype) for x, was in zip(new, old, strict=True))
            else:
                stored = encode(part.format, new, words(seeds.moments()))
                if part.rests:
                    stored = jax.tree.map(partial(jnp.where, rows), stored, old)
            next_kept.append(stored)
        if taken is not None:
            # A select: what is held back may be NaN.
            u = jnp.where(taken > 0, u, 0)
            next_kept = jax.tree.map(partial(jnp.where, taken > 0), next_kept, list(kept))
        results = [] if self.update_dtype is None else [u.astype(self.update_dtype)]
        if self.moves:
            results.append((stored_p + u).astype(p.dtype))  # pyright: ignore[reportOptionalOperand, reportOptionalMemberAccess]
        return next_kept, results


@dataclass(frozen=True)
class Call:
    """Leaves with one program that take a step in one call: what is static of it.

    Its operands are the scalars, a vector, in which a scalar that each layer has of its own lies as
    one number for each; the count, int32; for each leaf its number and that of
    its first element, uint32[n, 2]; what is kept; n gradients; and n parameters where the program
    reads them. Its results are what is kept; n updates where the program returns them; and n
    parameters where it moves them. Of a program that measures the result is the sum of all
    elements, or of those of each layer, a vector.
    """

    program: Program
    leaves: int
    kept: Any
    """The structure of what is kept: a list with a list over the parts for each leaf, or one for
    all that are packed."""
    packed: bool = False
    """Whether what is kept lies end to end for all leaves, in flat buffers."""
    strides: tuple[tuple[int, ...], ...] | None = None
    """Of shards: the strides of each whole leaf, by which elements are numbered there."""

    @property
    def arrays_kept(self) -> int:
        """How many arrays are kept."""
        return self.kept.num_leaves

    def strides_of(self, leaf: int, shape: Sequence[int]) -> tuple[int, ...]:
        """The strides by which the elements of one of the leaves are numbered."""
        return elements.strides_of(shape) if self.strides is None else self.strides[leaf]


def moving_rows(u: jax.Array) -> jax.Array:
    """Whether each row of the last axis, a scalar by itself, has anything but zeros."""
    return jnp.any(u != 0, axis=-1, keepdims=True) if u.ndim else u != 0


def _widened(x: jax.Array, real: Any) -> jax.Array:
    complex_of = jnp.complex64 if real == jnp.float32 else jnp.complex128
    return x.astype(complex_of if jnp.iscomplexobj(x) else real)


def _applied(part: Part, arrays: Sequence[Any], scalars: Sequence[Any]) -> Any:
    """What a formula returns, for each layer of a stacked leaf by itself."""

    def of_one(*layer: Any) -> Any:
        if part.mean is None:
            return part.formula(*layer, *scalars)
        values = part.mean(*layer, *scalars)
        if jnp.shape(values) != jnp.shape(layer[0]) or jnp.iscomplexobj(values):
            raise ValueError(
                f"{part.name}: what it takes the mean of is {describe(values)}; expected real"
                f" numbers of the shape of {describe(layer[0])}."
            )
        # 0 of an empty leaf.
        return part.formula(*layer, *scalars, jnp.sum(values) / max(values.size, 1))

    # With complex numbers formulas multiply real ones, which JAX's strict promotion refuses.
    mixed = any(map(jnp.iscomplexobj, arrays))
    with jax.numpy_dtype_promotion("standard") if mixed else nullcontext():
        return jax.vmap(of_one)(*arrays) if part.stacked else of_one(*arrays)


def _checked(part: Part, u: jax.Array, live: Sequence[jax.Array], returned: Any) -> Sequence[Any]:
    """What a formula returned, if it is an update and what its stage keeps."""
    results = returned if isinstance(returned, tuple | list) else (returned,)
    keeps = len(part.keeps)
    if len(results) != 1 + keeps:
        raise ValueError(
            f"{part.name}: its formula returned {len(results)} results; expected {1 + keeps},"
            f" the updates and the {keeps} that the stage keeps."
        )
    names = ("u", *["what it keeps"] * keeps)
    for what, result, like in zip(names, results, (u, *live), strict=True):
        narrower = jnp.iscomplexobj(result) and not jnp.iscomplexobj(like)
        if jnp.shape(result) != jnp.shape(like) or narrower:
            raise ValueError(
                f"{part.name}: its formula returned {describe(result)} for {what}; expected"
                f" {describe(like)}, as it was given."
            )
    return results
