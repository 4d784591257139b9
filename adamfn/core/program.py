# SPDX-License-Identifier: Apache-2.0
"""The program of a leaf: the formulas of one segment, one after another.

It decodes the state of the leaf, applies the formulas, and encodes the state again. At its end it
returns the update, moves the parameter, or both. Nothing is rounded or written to memory between
two formulas. Every backend runs calls of programs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamfn.core import formulas
from adamfn.core.leaf import Kept, decode, encode
from adamfn.core.weights import Weights
from adamfn.formats import Format
from adamfn.formats.format import answer
from adamfn.formats.noise import Seed, indices_of, noise_at
from adamfn.trees import described, widened


class Part(NamedTuple):
    """The formula of one stage in a program."""

    name: str
    formula: Callable[..., Any]
    reads: tuple[str, ...]
    keeps: tuple[str, ...]  # the names of the arrays that the stage keeps
    format: Format | None  # how they are stored; None for as they are

    def decoded(self, row: Kept, dtype: Any) -> list[jax.Array]:
        """The arrays that it keeps, as its formula reads them."""
        if self.format is None:
            return [widened(x, dtype) for x in row]
        return decode(self.format, self.keeps, row)

    def bounded(self, g: jax.Array) -> jax.Array:
        """The gradient, bounded as its format asks for."""
        largest = answer(self.format, "largest")
        return formulas.bounded(g, largest) if largest else g


@dataclass(frozen=True)
class Program:
    """The formulas of one segment for one leaf."""

    parts: tuple[Part, ...]
    scalars: Any  # their structure: a tuple with a tuple for each part
    dtype: Any  # the real one that it computes in
    moves: bool  # whether it moves the parameter
    update_dtype: Any  # of the update that it returns; None if it returns none
    gated: bool = False  # whether the last scalar is a gate: where it is 0, the step is skipped
    elementwise: bool = True  # whether outputs depend only on the matching input elements
    given: tuple[tuple[int, Part], ...] = ()
    """Parts of earlier segments whose moments it reads, each with its stage's place in the run."""
    given_grads: bool = False  # whether it is given the gradient besides the update
    is_last: bool = True  # whether its update is that of the run

    @property
    def fused(self) -> bool:
        """Whether backends other than XLA may run it."""
        elsewhere = any("new_params" in part.reads for part in self.parts)
        return self.elementwise and not (self.given or self.given_grads or elsewhere)

    @property
    def weights(self) -> Weights | None:
        """The format of a bfloat16 parameter that has lower bits; None for a parameter as it is."""
        found = (part.formula for part in self.parts if isinstance(part.formula, Weights))
        return next(found, None)

    @property
    def reads_params(self) -> bool:
        """Whether it is given the parameter."""
        return self.moves or any({"params", "new_params"} & {*part.reads} for part in self.parts)

    @property
    def known(self) -> bool:
        """Whether all its formulas are the library's."""
        modules = (formulas.__name__, Weights.__module__)
        return all(getattr(part.formula, "__module__", None) in modules for part in self.parts)

    def __call__(
        self,
        seed: Seed,
        scalars: Sequence[jax.Array],
        u: jax.Array,
        p: jax.Array | None,
        kept: Sequence[Kept],
        indices: jax.Array | None = None,
        given: Sequence[Any] = (),
    ) -> tuple[list[Kept], list[jax.Array]]:
        """Returns the next state for each part, then the update and the parameter, if asked for.

        Args:
          seed: of the random bits that round moments and weights.
          scalars: the scalars of all parts, in the program's dtype, then the gate.
          u: the gradient, or the update of an earlier segment.
          p: the parameter; None if the program does not read it.
          kept: the state of the leaf for each part.
          indices: of a shard's or a tile's elements in the whole leaf, uint32; None for all of it.
          given: the state of the leaf for each of the parts in `given`, then the gradient.
        """
        taken = scalars[-1] > 0 if self.gated else None

        def seen(g: jax.Array) -> jax.Array:
            # 0 in a skipped step, where it may be NaN: so would be derivatives, zero times NaN.
            g = widened(g, self.dtype)
            return g if taken is None else jnp.where(taken, g, 0)

        u = seen(u)
        stored: Any = None if p is None else widened(p, self.dtype)
        known: dict[str, Any] = {"params": stored, "grads": u}
        for part, row in zip(self.parts, kept, strict=True):
            if isinstance(part.formula, Weights):
                known["params"] = part.formula.decode(stored, *row)
        for (_, part), row in zip(self.given, given, strict=False):  # the gradient may follow
            known |= zip(part.keeps, part.decoded(row, self.dtype), strict=True)
        if self.given_grads:
            known["grads"] = seen(given[-1])
            for _, part in self.given:
                known["grads"] = part.bounded(known["grads"])

        def random_bits(*, weights: bool) -> jax.Array:
            at = indices_of(u.shape) if indices is None else indices
            return noise_at(seed, at, weights=weights)

        values = scalars[: self.scalars.num_leaves]
        next_kept: list[Kept] = []
        for part, own, old in zip(
            self.parts, jax.tree.unflatten(self.scalars, values), kept, strict=True
        ):
            if "new_params" in part.reads:
                known["new_params"] = self._landed(u, p, known.get("correction"))
            if "mu" in part.keeps:
                known["grads"] = u = part.bounded(u)
            if "noise" in part.reads:
                known["noise"] = random_bits(weights=True)
            live = part.decoded(old, self.dtype)
            read = [known[name] for name in part.reads]
            if isinstance(part.formula, Weights):
                read += [stored, random_bits(weights=True)]
            # With complex numbers formulas multiply real ones, which strict promotion refuses.
            mixed = any(map(jnp.iscomplexobj, (u, *read, *live)))
            with jax.numpy_dtype_promotion("standard") if mixed else nullcontext():
                u, *new = _checked(part, u, live, part.formula(u, *read, *live, *own))
            known |= zip(part.keeps, new, strict=True)
            if part.format is None:
                row = tuple(x.astype(was.dtype) for x, was in zip(new, old, strict=True))
            else:
                row = encode(part.format, part.keeps, new, random_bits(weights=False))
                row = row if self.elementwise else _unchanged_rows(row, old, new, live)
            next_kept.append(row)
        if taken is not None:
            u = jnp.where(taken, u, 0)
            # In a kernel, codes have not yet their narrow dtype.
            next_kept = jax.tree.map(
                lambda new, old: jnp.where(taken, new, old.astype(new.dtype)), next_kept, [*kept]
            )
        results = [] if self.update_dtype is None else [u.astype(self.update_dtype)]
        if self.moves:
            results.append((stored + u).astype(p.dtype))  # pyright: ignore[reportOptionalMemberAccess]
        return next_kept, results

    def _landed(self, u: jax.Array, p: Any, correction: jax.Array | None) -> jax.Array:
        """The weight after the step, as this program or `apply_updates` rounds it."""
        u = u if self.moves else widened(u.astype(self.update_dtype), self.dtype)
        landed = widened((widened(p, self.dtype) + u).astype(p.dtype), self.dtype)
        return landed if self.weights is None else self.weights.decode(landed, correction)


def _unchanged_rows(
    row: Kept, old: Kept, new: Sequence[jax.Array], live: Sequence[jax.Array]
) -> Kept:
    """A row that the formula returned as it was given keeps its codes, to the bit."""
    same = jnp.all(jnp.stack([a == b for a, b in zip(new, live, strict=True)]), axis=0)
    unchanged = jnp.all(same, axis=-1, keepdims=True) if same.ndim else same
    return jax.tree.map(
        lambda a, b: jnp.where(unchanged, b, a) if a.shape[:-1] == unchanged.shape[:-1] else a,
        row,
        old,
    )


def _checked(part: Part, u: jax.Array, live: Sequence[jax.Array], returned: Any) -> Sequence[Any]:
    """The results of a formula, if they are an update and the arrays that its stage keeps."""
    results = returned if isinstance(returned, tuple | list) else (returned,)
    keeps = len(part.keeps)
    if len(results) != 1 + keeps:
        raise ValueError(
            f"{part.name}: its formula returned {len(results)} results; expected {1 + keeps},"
            f" the updates and the {keeps} arrays that the stage keeps."
        )
    for what, result, like in zip(("u", *part.keeps), results, (u, *live), strict=True):
        narrower = jnp.iscomplexobj(result) and not jnp.iscomplexobj(like)
        if jnp.shape(result) != jnp.shape(like) or narrower:
            raise ValueError(
                f"{part.name}: its formula returned {described(result)} for {what}; expected"
                f" {described(like)}, as it was given."
            )
    return results
