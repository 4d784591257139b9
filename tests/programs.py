# SPDX-License-Identifier: Apache-2.0
"""The call of a chain's program on one leaf, for tests of the backends."""

import jax.numpy as jnp

from adamfn.backends.call import Call, Operands
from adamfn.chains import leaves, segment
from adamfn.chains.chain import chain_of


def call_of(tx, g, p):
    """The call that `step` makes for a leaf at its first step, and its operands."""
    stages = chain_of(tx).parts
    request = leaves.Request(p, {}, updates=False, moves=True)
    states = leaves.first_states(stages, p)
    count = leaves.next_count(stages, states)
    (leaf,) = leaves.leaves_of(stages, g, states, request)
    step = segment.step_at(stages, states, count, [g], request)
    (whole,) = segment.segments_of(stages)
    program = segment.program_of(step, whole, leaf, request)
    places = tuple(place for place in whole if leaf.active[place])
    kept = [[leaf.kept[place] for place in places]]
    vector, indices = step.vector(places, program.dtype), jnp.zeros((1, 2), jnp.uint32)
    return Call(program), Operands(vector, count, indices, kept, [g], [p])
