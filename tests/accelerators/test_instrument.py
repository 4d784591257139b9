# SPDX-License-Identifier: Apache-2.0
"""The figures show what a program does, on the compilers themselves."""

import jax
import pytest
from ahead_of_time import candidates, cost, traffic, trees

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


def test_a_loop_over_chunks_shows_its_chunks(machine):
    def halved(x):
        def chunk(i, x):
            part = jax.lax.dynamic_slice_in_dim(x, 1024 * i, 1024)
            return jax.lax.dynamic_update_slice_in_dim(x, part / 2, 1024 * i, 0)

        return jax.lax.fori_loop(0, SHAPE[0] // 1024, chunk, x)

    x = cost.on(cost.one_chip(machine), trees.abstract(SHAPE, "float32"))
    lowered = jax.jit(halved, donate_argnums=0).lower(x)
    text = lowered.compile(compiler_options=machine.compiler_options).as_text()
    found = traffic.traffic(text)
    assert "while(" in text
    assert found.moved == pytest.approx(2 * 4 * SHAPE[0] * SHAPE[1], rel=0.01)
    assert found.kernels == SHAPE[0] // 1024
