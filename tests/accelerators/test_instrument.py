"""The figures show what a program does, on the compilers themselves."""

import jax
import pytest
from ahead_of_time import candidates, cost, trees

import adamfn

SHAPE = (16384, 16384)


@pytest.mark.quick
def test_a_deliberate_copy_shows(machine):
    tx = adamfn.adam(1e-3)
    step = candidates.by_step(tx).step

    def with_copy(params, state, grads):
        grads = jax.tree.map(lambda g: jax.lax.optimization_barrier(2 * g), grads)
        return step(params, state, grads)

    chip = cost.one_chip(machine)
    params = cost.on(chip, trees.abstract({"leaf": SHAPE}, "float32"))
    state = cost.on(chip, jax.eval_shape(tx.init, params))
    found = cost.cost(with_copy, params, state, params, machine)
    leaf = 4 * SHAPE[0] * SHAPE[1]
    assert found.least == pytest.approx(7 * leaf, rel=1e-6)
    assert found.moved == pytest.approx(9 * leaf, rel=1e-4)
    assert found.temporary == pytest.approx(leaf, rel=1e-3)
    assert found.kernels == 2
