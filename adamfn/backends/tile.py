# SPDX-License-Identifier: Apache-2.0
"""A call of one leaf as kernels see it, and its program on a tile of the leaf."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from adamfn.backends.call import Call, Operands
from adamfn.core.placement import shape_like
from adamfn.formats.blocks import Largest, size_for
from adamfn.formats.format import InTile, answer
from adamfn.formats.noise import Runs, Seed, runs_of


@dataclass(frozen=True)
class LeafCall:
    """A call of one leaf."""

    call: Call
    operands: Operands

    @cached_property
    def arrays(self) -> list[jax.Array]:
        """The state, the update, and the parameter if it is read."""
        return jax.tree.leaves(self.operands[3:])

    @property
    def u(self) -> jax.Array:
        """The update."""
        return self.operands.updates[0]

    @cached_property
    def results(self) -> list[tuple[int, Any]]:
        """For each result the array like it, which it replaces unless it is u, and its dtype."""
        program, at = self.call.program, self.place_of_u
        places = [*range(at), *[at] * (program.update_dtype is not None), *[at + 1] * program.moves]
        return [(k, program.update_dtype if k == at else self.arrays[k].dtype) for k in places]

    @property
    def place_of_u(self) -> int:
        """The place of the update among the arrays."""
        return len(self.arrays) - 1 - len(self.operands.params)

    @cached_property
    def block(self) -> int | None:
        """The largest block of its formats; 0 if all are elementwise, None if it has no kernel."""
        program, leaves = self.call.program, self.arrays[self.place_of_u :]
        found = {0, *(answer(part.format, "kernel_block") for part in program.parts)}
        fits = (
            None not in found
            and len(found) <= 2
            and program.dtype == jnp.float32
            and all(x.dtype in (jnp.float32, jnp.bfloat16) for x in leaves)
            and self.u.size > 0
        )
        return max(found) if fits else None

    @property
    def size(self) -> int:
        """The elements of a block; 0 if there are none."""
        return size_for(self.u.shape[-1], self.block) if self.block else 0

    @property
    def strides(self) -> tuple[int, ...]:
        """Those in which its elements are indexed."""
        return self.call.strides_of(0, self.u.shape)

    @property
    def runs(self) -> Runs:
        """The axes along which its elements are indexed."""
        return runs_of(self.u.shape, self.strides)

    def shaped(self, results: Sequence[jax.Array]) -> list[jax.Array]:
        """Results in the shapes of the arrays like them."""
        return [
            x.reshape(self.arrays[k].shape) for (k, _), x in zip(self.results, results, strict=True)
        ]

    def run_kernel(
        self, kernel: Callable[..., None], views: Sequence[jax.Array], platform: str, **options: Any
    ) -> list[jax.Array]:
        """Runs a Pallas kernel, in place, on views of the arrays.

        The kernel gets three references that `run_tile` takes as its step, those to the views, and
        those to the results.
        """
        scalars, count, indices = self.operands[:3]
        out_shape = [shape_like(views[k], dtype) for k, dtype in self.results]
        moved, most = [*views, *out_shape], max(x.size for x in views)
        aliases = {3 + k: at for at, (k, _) in enumerate(self.results) if k != self.place_of_u}
        cost = pl.CostEstimate(  # for XLA's scheduler; the operations are a guess
            100 * most, 2 * most, sum(x.size * x.dtype.itemsize for x in moved)
        )
        with jax.enable_x64(False):  # Mosaic has no numbers of 64 bits, not even for constants
            return pl.pallas_call(
                lambda *refs: kernel(refs[:3], *refs[3:]),
                out_shape,
                input_output_aliases=aliases,
                cost_estimate=cost,
                interpret=platform == "cpu",
                name="adamfn_step",
                **options,
            )(scalars, count.reshape(1), indices.reshape(2).astype(jnp.int32), *views)

    def run_tile(
        self,
        step: Sequence[Any],
        tiles: Sequence[jax.Array],
        indices: jax.Array,
        inside: jax.Array | None,
        largest: Largest,
    ) -> list[jax.Array]:
        """The values of all results for a tile of whole blocks, in any dtype that holds them.

        Args:
          step: references to the scalars; to the count; to the leaf's index in the tree and the
            index of its first element.
          tiles: the tile of each array.
          indices: the elements' indices, int32, counted from the leaf's first element.
          inside: True for elements of the leaf; None if all are.
          largest: the largest of the tile's blocks.
        """
        parts = tuple(
            part._replace(format=InTile(part.format, inside, largest))
            if answer(part.format, "kernel_block")
            else part
            for part in self.call.program.parts
        )
        program = replace(self.call.program, parts=parts)
        vector, count, (leaf, first) = step[0], step[1][0], (step[2][0], step[2][1])
        scalars = [vector[k] for k in range(program.scalars.num_leaves + program.gated)]
        (kept,), (u,), p = jax.tree.unflatten(jax.tree.structure(self.operands[3:]), tiles)
        indices = indices.astype(jnp.uint32) + first.astype(jnp.uint32)
        seed = Seed(count, leaf)
        return jax.tree.leaves(program(seed, scalars, u, p[0] if p else None, kept, indices))
