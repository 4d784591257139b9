# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters: what is accepted, and in which precision it arrives."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.core.hyperparameters import scalar, scheduled, value_at


@pytest.mark.parametrize(
    "value",
    [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), np.array(0.5), Fraction(1, 2)],
    ids=repr,
)
def test_numbers_become_python_floats(value):
    found = scalar("b1", value, below=1)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("value", [0, 0.0, np.int32(0), np.array(0), -0.0], ids=repr)
def test_zero_is_in_range(value):
    found = scalar("b1", value, below=1)
    assert type(found) is float
    assert found == 0


def test_the_bound_itself_is_out_of_range():
    assert scalar("b1", np.nextafter(1, 0), below=1) < 1
    assert scalar("eps", 1e300) == 1e300
    with pytest.raises(ValueError, match="less than 1"):
        scalar("b1", 1.0, below=1)


def test_arrays_stay_arrays():
    for value in (jnp.float32(0.5), jnp.array(0.5)):
        assert scalar("b1", value, below=1) is value
    whole = scalar("b1", jnp.int32(0), below=1)
    assert whole.dtype == jnp.float32
    with jax.enable_x64(True):
        assert scalar("b1", jnp.float64(0.5)).dtype == jnp.float64


def test_the_value_of_an_array_is_not_fetched():
    # It may be on its way, or traced; so its range is the caller's affair.
    for value in (2.0, -1.0, jnp.nan, jnp.inf):
        adamfn.adam(*[jnp.float32(value)] * 4, eps_root=jnp.float32(value))
    jax.eval_shape(lambda b: adamfn.adam(b, b, b, b, eps_root=b).init(jnp.zeros(1)), jnp.float32(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_rate_or_decay_may_be_narrow_but_not_an_average(dtype):
    # As inject_hyperparams hands them over with bfloat16 parameters: optax issue 1414.
    narrow = jnp.asarray(0.5, dtype)
    assert scheduled("learning_rate", narrow) is narrow
    with pytest.raises(TypeError, match=f"b2 is an array of {dtype.dtype}"):
        scalar("b2", narrow, below=1)


def test_schedules_come_back_as_they_are():
    def schedule(count):
        return count * 0.5

    assert scheduled("learning_rate", schedule) is schedule
    assert value_at("learning_rate", schedule, jnp.int32(3)) == 1.5
    assert value_at("learning_rate", 0.25, jnp.int32(3)) == 0.25
    assert value_at("learning_rate", lambda count: np.float32(2), jnp.int32(3)) == 2
    assert value_at("learning_rate", lambda count: 2, jnp.int32(3)) == 2


class Variable:
    """Keras's and flax's: an array to JAX, and not a function, though it can be called."""

    def __jax_array__(self):
        return jnp.float32(0.5)

    def __call__(self):
        raise AssertionError


def test_variables_are_arrays():
    nnx = pytest.importorskip("flax.nnx")
    for value in (Variable(), nnx.Variable(jnp.float32(0.5))):
        assert scheduled("learning_rate", value) == 0.5
        assert scalar("b1", value, below=1) == 0.5
        assert value_at("learning_rate", lambda count, own=value: own, jnp.int32(3)) == 0.5
        tx, ones = adamfn.adam(value), jnp.ones(1)
        for rate in ({}, {"learning_rate": value}):
            assert abs(tx.update(ones, tx.init(ones), **rate)[0] + 0.5) < 1e-6


def test_static_numbers_are_not_rounded_before_use():
    # 1 - float32(0.999999) is 4.6% larger than 1e-6.
    tx = adamfn.scale_by_moments(b2=0.999999)
    for update in (tx.update, jax.jit(tx.update)):
        _, state = update(jnp.ones(1), tx.init(jnp.ones(1)))
        np.testing.assert_allclose(state.nu, [1e-6], rtol=3e-7)


def test_traced_and_static_hyperparameters_agree():
    g = jnp.array([1.0, -1e-3, 5.0])

    def three_steps(lr, b1, b2, eps, eps_root, decay):
        tx = adamfn.adamw(lr, b1, b2, eps, eps_root=eps_root, weight_decay=decay)
        state = tx.init(g)
        for _ in range(3):
            updates, state = tx.update(g, state, g)
        return updates

    values = (0.1, 0.9, 0.99, 1e-3, 1e-4, 0.1)
    np.testing.assert_allclose(jax.jit(three_steps)(*values), three_steps(*values), rtol=3e-6)


@pytest.mark.parametrize("traced_index", range(4))
def test_one_traced_among_static(traced_index):
    values = [0.1, 0.9, 0.99, 1e-3]

    def two_steps(value):
        tx = adamfn.adam(*values[:traced_index], value, *values[traced_index + 1 :])
        g = jnp.array([1.0, -1e-3, 5.0])
        _, state = tx.update(g, tx.init(g))
        return tx.update(g / 3, state)[0]

    for value in (values[traced_index], values[traced_index] / 2):
        np.testing.assert_allclose(jax.jit(two_steps)(value), two_steps(value), rtol=3e-6)
    assert np.all(two_steps(value) != two_steps(values[traced_index]))


def test_several_values_at_once_by_vmap():
    g = jnp.array([1.0, 2.0])

    def update(lr, b1):
        tx = adamfn.adam(lr, b1)
        return tx.update(g, tx.init(g))[0]

    rates = jnp.array([0.1, 0.2])
    found = jax.vmap(update)(rates, jnp.array([0.9, 0.0]))
    np.testing.assert_allclose(found, -rates[:, None] * np.ones((2, 2)), rtol=1e-6)
