# SPDX-License-Identifier: Apache-2.0
"""Published failures of optax, by issue number: adamfn does not have them.

Where it is cheap to show, a test also says that optax fails today. Once optax no longer does, that
line goes and the rest stays.
"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adamfn

DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]
RECIPES = {
    "adam": adamfn.adam(0.1),
    "adamw": adamfn.adamw(0.1),
    "nesterov": adamfn.adam(0.1, nesterov=True),
}


@pytest.fixture(autouse=True)
def _own_trace_counts():
    chex.clear_trace_counter()  # chex counts by a function's name and line, over all tests


def dtypes(tree):
    return jax.tree.map(lambda x: (x.dtype, x.weak_type), tree)


def test_206_the_rate_applied_is_read_from_the_state():
    """Optax #206: the learning rate of a schedule could not be logged, only computed again."""
    schedule = optax.warmup_cosine_decay_schedule(0.01, 1.0, 2, 8)
    # Skipped steps are what computing it again from one's own step counter gets wrong.
    tx = optax.apply_if_finite(adamfn.adam(schedule), 9)
    direction = adamfn.chain(adamfn.scale_by_moments(), adamfn.bias_correct())
    state, towards = tx.init(jnp.zeros(3)), direction.init(jnp.zeros(3))
    update = jax.jit(tx.update)
    taken = 0
    for step in range(8):
        broken = step in (2, 5)
        g = jnp.array([1.0, -2.0, jnp.nan if broken else 0.5]) * (1 + step)
        updates, state = update(g, state)
        if broken:
            assert not np.any(updates)
        else:
            u, towards = direction.update(g, towards)
            applied = -updates / u
            taken += 1
        rate = optax.tree.get(state, "learning_rate")
        np.testing.assert_allclose(rate, applied, rtol=3e-7)  # three roundings
        np.testing.assert_allclose(rate, schedule(taken - 1), rtol=1e-6)
    assert optax.tree.get(optax.adam(schedule).init(jnp.zeros(3)), "learning_rate") is None


def test_577_a_new_learning_rate_does_not_recompile():
    """Optax #577: a rate that changes at will meant a new optimizer, traced anew."""
    tx = adamfn.adamw()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(g, state, params, learning_rate):
        updates, state = tx.update(g, state, params, learning_rate=learning_rate)
        return adamfn.apply_updates(params, updates), state

    params = jnp.array([1.0, -1.0])
    state = tx.init(params)
    for rate in (0.1, 0.03, 1e-5, 2.0, 0.0):
        before = params
        params, state = step(jnp.array([1.0, -1.0]), state, params, rate)
        assert optax.tree.get(state, "learning_rate") == np.float32(rate)
        # The same gradient again and again moves by the rate, and adamw decays by 1e-2 of it.
        expected = before - rate * (np.sign([1.0, -1.0]) + 1e-2 * before)
        np.testing.assert_allclose(params, expected, rtol=1e-6)


class Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        raise AssertionError("the mask was called")


def first_decay(tx, layer):
    """The parameters' own part of an update with no gradient."""
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, layer), tx.init(layer), layer)
    return np.asarray(updates.weight), np.asarray(updates.bias)


@pytest.mark.parametrize("kind", ["module", "function", "partial"])
def test_1007_a_mask_may_be_a_tree_that_can_be_called(kind):
    """Optax #1007 (and #913): an Equinox module of bools was taken for a function and called."""
    layer = Layer(jnp.array([2.0, 4.0]), jnp.array([3.0]))
    module = Layer(True, False)
    mask = {
        "module": module,
        "function": lambda params: jax.tree.map(lambda p: p.size > 1, params),
        "partial": functools.partial(lambda m, params: m, module),
    }[kind]
    weight, bias = first_decay(adamfn.adamw(0.5, weight_decay=0.25, mask=mask), layer)
    np.testing.assert_array_equal(weight, [-0.25, -0.5])
    np.testing.assert_array_equal(bias, [0.0])


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("mask", [None, True, {"w": True}], ids=["all", "prefix", "tree"])
def test_1426_weight_decay_may_be_a_schedule(wrap, mask):
    """Optax #1426: AdamW took no schedule of the weight decay, except by injection."""
    schedule = optax.piecewise_interpolate_schedule("linear", 0.5, {3: 0.1, 6: 0.0})
    tx = adamfn.adamw(0.1, weight_decay=schedule, mask=mask)
    params = {"w": jnp.array([3.0, -2.0])}
    state = tx.init(params)
    update = wrap(tx.update)
    rates = []
    for step in range(7):
        updates, state = update({"w": jnp.zeros(2)}, state, params)
        rates.append(float(schedule(step)))
        np.testing.assert_allclose(updates["w"], -0.1 * rates[-1] * params["w"], rtol=1e-6)
        params = adamfn.apply_updates(params, updates)
    assert rates[0] == 0.5
    assert rates[-1] == 0.0
    assert len(set(rates)) == 7


def test_1414_b2_injected_as_bfloat16_is_refused():
    """Optax #1414: inject_hyperparams rounds b2 to the parameters' bfloat16, where it is 1."""
    params = jnp.ones(2, jnp.bfloat16)
    injected = optax.inject_hyperparams(adamfn.adam)(learning_rate=0.1)
    with pytest.raises(TypeError, match=r"bfloat16.*hyperparam_dtype=jnp\.float32"):
        injected.init(params)

    injected = optax.inject_hyperparams(adamfn.adam, hyperparam_dtype=jnp.float32)(0.1)
    state = injected.init(params)
    updates, _ = injected.update(jnp.array([4.0, -0.25], jnp.bfloat16), state, params)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(float), [-0.1, 0.1], rtol=2**-8)

    theirs = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    assert theirs.init(params).hyperparams["b2"] == 1


@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_1552_state_dtypes_are_float32_and_stay(param_dtype, grad_dtype):
    """Optax #1552: moments took the parameters' bfloat16, and other dtypes after a step."""
    params = {"w": jnp.ones((2, 3), param_dtype), "b": jnp.asarray(1.0, param_dtype)}
    g = jax.tree.map(lambda p: jnp.full_like(p, 0.5, dtype=grad_dtype), params)
    multi = optax.MultiSteps(adamfn.adamw(0.1), 2)
    for tx in (*RECIPES.values(), multi):
        before = tx.init(params)
        for moment in ("mu", "nu"):
            assert set(jax.tree.leaves(dtypes(optax.tree.get(before, moment)))) == {
                jnp.dtype(jnp.float32),
                False,
            }
        eagerly = [tx.update] if grad_dtype != param_dtype == jnp.bfloat16 else []
        for update in (*eagerly, functools.partial(jax.eval_shape, tx.update)):
            updates, after = update(g, before, params)
            assert dtypes(after) == dtypes(before)
            # Small float16 updates of wider parameters would be lost.
            lost = grad_dtype == jnp.float16 and param_dtype != jnp.float16
            expected = jnp.float32 if lost else grad_dtype
            assert [u.dtype for u in jax.tree.leaves(updates)] == [expected] * 2
            moved = jax.eval_shape(adamfn.apply_updates, params, updates)
            assert [p.dtype for p in jax.tree.leaves(moved)] == [param_dtype] * 2

        def step(carry, _, tx=tx):  # scan refuses a carry whose dtypes change
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (adamfn.apply_updates(params, updates), state), None

        jax.eval_shape(functools.partial(jax.lax.scan, step, length=4), (params, before))


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_1552_the_second_moment_does_not_stall(grad_dtype):
    """Optax #1552: in bfloat16, nu stops growing once a step's growth is under half a unit."""
    params = jnp.ones(3, jnp.bfloat16)
    g = jnp.array([0.5, 3.0, -0.01], grad_dtype)

    def nu_after(tx, steps=1000):
        state, _ = jax.lax.scan(
            lambda state, _: (tx.update(g, state, params)[1], None), tx.init(params), length=steps
        )
        return np.float64(optax.tree.get(state, "nu"))

    expected = np.float64(g) ** 2 * (1 - 0.999**1000)
    np.testing.assert_allclose(nu_after(adamfn.adam()), expected, rtol=1e-4)
    if grad_dtype == jnp.bfloat16:
        assert np.all(nu_after(optax.adam(1e-3)) < 0.9 * expected)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_1755_float16_zero_gradients_give_zero(recipe, dtype):
    """Optax #1755 and #1754: in float16, eps is 0 and a zero gradient gave 0/0."""
    tx, nesterov = RECIPES[recipe], recipe == "nesterov"
    params = {"w": jnp.zeros((2, 3), dtype), "b": jnp.zeros((), dtype)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for update in (tx.update, jax.jit(tx.update)):
        state = tx.init(params)
        for _ in range(4):
            updates, state = update(zeros, state, params)
            for u in jax.tree.leaves(updates):
                np.testing.assert_array_equal(np.float32(u), 0)  # false for NaN
    # A gradient that comes later is met as it should be.
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    expected = reference.updates([0, 0, 0, 0, 1], 0.1, nesterov=nesterov)[-1]
    np.testing.assert_allclose(
        np.float64(updates["b"]), expected, rtol=max(jnp.finfo(dtype).eps, 1e-6)
    )


@pytest.mark.parametrize("make", [optax.adam, optax.adamw, optax.nadam])
def test_1755_optax_gives_nan(make):
    zeros = jnp.zeros(2, jnp.float16)
    tx = make(0.1)
    assert np.all(np.isnan(np.float32(tx.update(zeros, tx.init(zeros), zeros)[0])))
