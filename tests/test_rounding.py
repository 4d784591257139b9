"""apply_updates with stochastic rounding: bfloat16 parameters without a float32 copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn


def add(params, updates, count, rounding="stochastic"):
    return adamfn.apply_updates(params, updates, rounding=rounding, count=count)


def train(rounding, steps=3000):
    """Fits a line with bfloat16 parameters and a small rate; returns the last loss."""
    x = jnp.linspace(-1, 1, 64)
    y = 3.0 * x + 2.0
    tx = adamfn.adam(1e-3)

    def step(carry, count):
        params, state = carry

        def loss(p):
            a, b = p["a"].astype(jnp.float32), p["b"].astype(jnp.float32)
            return jnp.mean((a * x + b - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return (add(params, updates, count, rounding), state), value

    params = {"a": jnp.bfloat16(1.0), "b": jnp.bfloat16(1.0)}
    carry = (params, tx.init(params))
    return jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(steps))[1])(carry)[-1]


def test_training_that_stalls_with_nearest_rounding_goes_on():
    # Updates of 1e-3 are a quarter of the distance between bfloat16 numbers from 1 to 2.
    assert train("nearest") > 1.0
    assert train("stochastic") < 1e-2


def test_sums_are_right_on_average():
    p = jnp.full((400, 400), 1.0, jnp.bfloat16)
    u = jnp.full(p.shape, 2.0**-10)  # an eighth of the distance to the next
    moved = np.asarray(add(p, u, 3), np.float64)
    assert set(np.unique(moved)) == {1.0, 1 + 2.0**-7}
    up = np.mean(moved > 1)
    assert abs(up - 1 / 8) < 5 * np.sqrt(1 / 8 * 7 / 8 / p.size)


def test_the_noise_depends_on_count_and_leaf_and_nothing_else():
    p = {"a": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones((64, 64), jnp.bfloat16)}
    u = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-9), p)
    first, again, later = add(p, u, 1), jax.jit(add)(p, u, jnp.int32(1)), add(p, u, 2)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.mean(np.asarray(first["a"] != later["a"])) > 0.2
    assert np.mean(np.asarray(first["a"] != first["b"])) > 0.2


def test_the_noise_is_not_that_of_the_moments():
    from adamfn.formats import noise

    p = jnp.ones((256, 256), jnp.bfloat16)
    moved = add(p, jnp.full(p.shape, 2.0**-8), 5) > 1
    for bits in (noise(5, 0, p.shape) & 0xFFFF, noise(5, 0, p.shape) >> 16):
        together = np.corrcoef(np.ravel(moved), np.ravel(bits).astype(float))[0, 1]
        assert abs(together) < 5 / 256


def test_other_dtypes_and_none_are_as_with_nearest():
    p = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.complex64), "c": jnp.ones(2), "d": None}
    u = {"a": jnp.full(3, 0.1), "b": jnp.full(2, 0.1j), "c": None, "d": None}
    expected = adamfn.apply_updates(p, u)
    jax.tree.map(np.testing.assert_array_equal, add(p, u, 1), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_is_not_finite_shows(value):
    moved = add(jnp.ones(2, jnp.bfloat16), jnp.full(2, value), 1)
    assert not np.any(np.isfinite(np.asarray(moved, np.float32))) or value == 3.4e38


def test_a_count_of_more_than_32_bits():
    p, u = jnp.ones((64, 64), jnp.bfloat16), jnp.full((64, 64), 2.0**-9)
    np.testing.assert_array_equal(add(p, u, 2**40 + 7), add(p, u, 7))


def test_senseless_arguments():
    p, u = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="rounding is 'up'; expected 'nearest' or 'stochastic'"):
        add(p, u, 1, rounding="up")
    for count in (None, 1.0, jnp.ones(2, int)):
        with pytest.raises(ValueError, match=r"count is .*; expected the step, an integer scalar"):
            add(p, u, count)
    with pytest.raises(TypeError, match=r"the leaf at w is float16\[2\]; expected bfloat16"):
        add({"w": jnp.ones(2, jnp.float16)}, u, 1)
    with pytest.raises(ValueError, match="params and updates differ"):
        add(p, {"w": jnp.ones(3)}, 1)
