"""The call of a chain's program on one leaf, for tests of what runs it."""

import jax
import jax.numpy as jnp

from adamfn.chains import calls
from adamfn.chains import segment as joined
from adamfn.chains.chain import elements, structure_of
from adamfn.core.layers import layers_of
from adamfn.core.leaf import kept_by_leaf
from adamfn.core.program import Call
from adamfn.formats import choose_formats


def call_of(tx, g, p):
    """What `step` would call for a leaf at its first step, and the operands."""
    stages = list(elements(structure_of(tx)))
    count, states = joined.count_of(stages, joined.first_states(stages, p))
    scalars, _ = joined.scalars_at(stages, states, count, {})
    formats = [choose_formats(stage.moments, g) for stage in stages]
    kept = [
        [
            kept_by_leaf(stage, state, g, own)[0]
            for stage, state, own in zip(stages, states, formats, strict=True)
        ]
    ]
    (program,) = calls.leaf_programs(
        stages,
        formats,
        joined.masks_of(stages, g, p),
        layers_of(stages, g, p),
        scalars,
        [g],
        [p],
        kept,
        returns=False,
        moves=True,
    )
    vector = calls.Vectors(scalars)[program.dtype]
    arrays = [jnp.zeros((1, 2), jnp.uint32), *jax.tree.leaves(kept), g, p]
    return Call(program, 1, jax.tree.structure(kept)), [vector, count, *arrays]
