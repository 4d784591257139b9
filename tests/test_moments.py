# SPDX-License-Identifier: Apache-2.0
"""scale_by_moments: the averages it keeps and the ratio it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

LAST = 2**31 - 1


def test_the_state_begins_at_zero():
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": None, "c": jnp.ones(2, jnp.complex64)}
    state = adamfn.scale_by_moments().init(params)
    assert state._fields == ("count", "mu", "nu", "scales")
    assert state.scales == {}
    assert state.count.dtype == jnp.int32
    assert all(np.all(x == 0) for x in jax.tree.leaves(state))
    assert state.mu["b"] is state.nu["b"] is None


@pytest.mark.parametrize(
    ("dtype", "mu", "nu"),
    [
        ("float16", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("complex64", "complex64", "float32"),
        ("complex128", "complex128", "float64"),
    ],
)
def test_dtypes_of_the_moments(dtype, mu, nu):
    with jax.enable_x64(dtype in ("float64", "complex128")):
        g = jnp.ones((2,), dtype)
        tx = adamfn.scale_by_moments()
        before = tx.init(g)
        updates, after = tx.update(g, before, g)
        assert updates.dtype == dtype
        for state in (before, after):
            assert (state.mu.dtype, state.nu.dtype) == (mu, nu)
            assert state.mu.shape == state.nu.shape == (2,)


def test_averages_and_ratio():
    tx = adamfn.scale_by_moments(b1=0.5, b2=0.75, eps=0.5)
    state = tx.init(jnp.zeros(2))
    updates, state = tx.update(jnp.array([2.0, -4.0]), state)
    np.testing.assert_allclose(state.mu, [1, -2])
    np.testing.assert_allclose(state.nu, [1, 4])
    c = np.sqrt(1 - 0.75)
    np.testing.assert_allclose(updates, [1 / (1 + 0.5 * c), -2 / (2 + 0.5 * c)], rtol=1e-6)
    updates, state = tx.update(jnp.array([4.0, 0.0]), state)
    np.testing.assert_allclose(state.mu, [2.5, -1])
    np.testing.assert_allclose(state.nu, [4.75, 3])
    c = np.sqrt(1 - 0.75**2)
    expected = [2.5 / (np.sqrt(4.75) + 0.5 * c), -1 / (np.sqrt(3) + 0.5 * c)]
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert state.count == 2


def test_eps_root_is_under_the_root_in_corrected_units():
    tx = adamfn.scale_by_moments(b1=0.5, b2=0.75, eps=0, eps_root=3.0)
    updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    np.testing.assert_allclose(updates, [1 / np.sqrt(1 + 0.25 * 3)], rtol=1e-6)


def test_nesterov_looks_one_step_ahead():
    tx = adamfn.scale_by_moments(b1=0.5, b2=0.75, eps=0, nesterov=True)
    updates, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    # m = 1, sqrt(v) = 1, c1(1) / c1(2) = 0.5 / 0.75
    np.testing.assert_allclose(updates, [0.5 * 1 * (0.5 / 0.75) + 0.5 * 2], rtol=1e-6)
    np.testing.assert_allclose(state.mu, [1.0])  # what is kept is the plain average


def test_the_square_of_a_complex_gradient_is_its_squared_modulus():
    tx = adamfn.scale_by_moments(b1=0.5, b2=0.5, eps=0)
    g = jnp.array([3 + 4j])
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_allclose(state.mu, [1.5 + 2j])
    np.testing.assert_allclose(state.nu, [12.5])
    np.testing.assert_allclose(updates, (1.5 + 2j) / np.sqrt([12.5]), rtol=1e-6)


@pytest.mark.parametrize("b", [0, 0.0, np.float32(0), jnp.float32(0), jnp.int32(0)], ids=repr)
def test_an_average_with_no_memory_is_the_gradient(b):
    tx = adamfn.scale_by_moments(b1=b, b2=b)
    state = tx.init(jnp.zeros(3))
    for g in (jnp.array([1 / 3, 1e-3, -7.0]), jnp.array([0.1, -1e5, 0.3])):
        _, state = tx.update(g, state)
        np.testing.assert_array_equal(state.mu, g)
        np.testing.assert_allclose(state.nu, g * g, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@pytest.mark.parametrize("make", [adamfn.scale_by_moments, adamfn.adam, adamfn.adamw])
def test_zero_gradients_give_zero_updates(make, dtype):
    # eps = 1e-8 is 0 in float16, where 0 / (0 + eps) would be NaN (optax issue 1552's kind).
    tx = make()
    params = jnp.zeros(3, dtype)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jnp.zeros(3, dtype), state, params)
        np.testing.assert_array_equal(np.asarray(updates), 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_gradients_whose_squares_underflow(dtype):
    # (2^-14)^2 is 0 in float16; the squares are taken in float32.
    g = jnp.array([2.0**-14, -(2.0**-14)], dtype)
    tx = adamfn.adam(1.0, eps=0)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates.astype(jnp.float32), [-1, 1], rtol=1e-2)


def test_narrow_gradients_whose_squares_overflow():
    g = jnp.array([6e4, -6e4], jnp.float16)
    tx = adamfn.adam(1.0)
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates.astype(jnp.float32), [-1, 1], rtol=1e-2)


def test_the_average_of_small_steps_does_not_stick():
    # In bfloat16, 1 + 0.001 (g^2 - 1) is 1 for ever; float32 moments get there.
    tx = adamfn.scale_by_moments()
    g = jnp.array([2.0], jnp.bfloat16)
    state = tx.init(g)._replace(nu=jnp.array([1.0]))
    for _ in range(50):
        _, state = tx.update(g, state)
    np.testing.assert_allclose(state.nu, [4 - 3 * 0.999**50], rtol=1e-5)


def test_a_derivative_through_zero_gradients():
    def total(g, eps_root):
        tx = adamfn.adam(1.0, eps_root=eps_root)
        return jnp.sum(tx.update(g, tx.init(g))[0])

    slope = jax.grad(total)(jnp.zeros(2), 1e-8)
    np.testing.assert_allclose(slope, -1 / (np.sqrt(1e-8) + 1e-8), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(total)(jnp.zeros(2), 0.0), -1e8, rtol=1e-5)  # -1 / eps


@pytest.mark.parametrize("count", [0, 41, LAST - 1, LAST])
def test_the_count_stops_at_its_last(count):
    tx = adamfn.scale_by_moments(nesterov=True)
    state = tx.init(jnp.zeros(1))._replace(count=jnp.int32(count))
    updates, state = tx.update(jnp.ones(1), state)
    assert state.count.dtype == jnp.int32
    assert state.count == min(count + 1, LAST)
    assert np.all(np.isfinite(updates))


def test_nan_stays_in_its_leaf_and_raises_nothing():
    tx = adamfn.adam()
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    updates, _ = tx.update({"a": jnp.array([jnp.nan, 1.0]), "b": jnp.ones(2)}, tx.init(params))
    assert np.isnan(updates["a"]).tolist() == [True, False]
    assert np.all(np.isfinite(updates["b"]))
