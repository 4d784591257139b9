# SPDX-License-Identifier: Apache-2.0
"""Leaves: every result at its own, however they share calls; what is one and what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.trees import check_inexact, real_dtype, wide_dtype

SHAPES = [(3,), (2, 2), ()]


def interleaved(count):
    """Leaves of three shapes in turn, each with values of its own."""
    return {
        f"{index:04}": jnp.full(SHAPES[index % 3], 1.0 + index, jnp.float32)
        for index in range(count)
    }


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_adam_over_many_interleaved_leaves_equals_adam_over_each(wrap):
    params = interleaved(140)
    tx = adamfn.adamw(0.1, weight_decay=0.1)
    state = tx.init(params)
    grads = {name: jnp.sin(leaf) for name, leaf in params.items()}
    update = wrap(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
    alone = jax.jit(tx.update)
    for name in list(params)[::9]:
        own = tx.init(params[name])
        for _ in range(2):
            expected, own = alone(grads[name], own, params[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)
        np.testing.assert_allclose(state[0].mu[name], own[0].mu, rtol=1e-6)
        np.testing.assert_allclose(state[0].nu[name], own[0].nu, rtol=1e-6)


def test_one_trace_serves_all_leaves_of_one_signature():
    traced = []

    def formula(u):
        traced.append(u.shape)
        return u

    tx = adamfn.from_stage(adamfn.Stage("noted", formula))
    tree = [jnp.zeros((7, columns)) for columns in (3, 5) * 20]
    state = tx.init(tree)
    tx.update(tree, state)
    assert set(traced) == {(7, 3), (7, 5)}
    assert len(traced) <= 4  # to find mistakes, and to lower
    tx.update(tree, state)
    assert len(traced) <= 4


def test_wide_and_real_dtypes():
    assert wide_dtype(jnp.bfloat16) == wide_dtype(jnp.float16) == wide_dtype(jnp.float32)
    assert wide_dtype(jnp.float32) == jnp.float32
    assert wide_dtype(jnp.complex64) == jnp.complex64
    assert wide_dtype(jnp.float64) == jnp.float64
    assert real_dtype(jnp.complex64) == jnp.float32
    assert real_dtype(jnp.complex128) == jnp.float64
    assert real_dtype(jnp.float32) == jnp.float32


def test_floats_of_any_kind_are_leaves():
    check_inexact([1.0, 1j, np.ones(2), np.float16(1), jnp.ones(2, jnp.bfloat16), None, {}], "x")


@pytest.mark.parametrize("leaf", [1, True, "x", len, jnp.arange(2), jax.random.key(0)])
def test_other_things_are_not(leaf):
    with pytest.raises(TypeError, match=r"x: the leaf at \['a'\]\[0\] is"):
        check_inexact({"a": [leaf], "b": 1.0}, "x")
