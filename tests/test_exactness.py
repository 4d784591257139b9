# SPDX-License-Identifier: Apache-2.0
"""Updates against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import adamfn

pytestmark = pytest.mark.optimized  # the bounds are a few roundings

STEPS, SIZE = 60, 4096
LAST = 2**31 - 1


def wide_gradients(seed, dtype=np.float32):
    """Gradients whose scales span nine decades."""
    rng = np.random.default_rng(seed)
    shape = (STEPS, SIZE)
    values = rng.standard_normal(shape) * 10 ** rng.uniform(-8, 1, (1, SIZE))
    if np.issubdtype(dtype, np.complexfloating):
        values = values * np.exp(2j * np.pi * rng.random(shape))
    return values.astype(dtype)


def run(tx, grads, update=None, params=None):
    """The updates of every step, in double precision."""
    state = tx.init(jnp.zeros_like(grads[0]))
    found = []
    for g in grads:
        u, state = (update or tx.update)(jnp.asarray(g), state, params)
        found.append(np.asarray(u))
    return np.asarray(found).astype(np.result_type(np.asarray(found).dtype, np.float64))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_static_hyperparameters(wrap, seed):
    grads = wide_gradients(seed)
    tx = adamfn.adam()
    found = run(tx, grads, wrap(tx.update))
    assert reference.worst_error(found, reference.updates(grads)) < 4e-7


@pytest.mark.parametrize("seed", range(3))
def test_traced_hyperparameters(seed):
    grads = wide_gradients(seed)

    @jax.jit
    def update(g, state, lr, b1, b2, eps):
        return adamfn.adam(lr, b1, b2, eps).update(g, state)

    found = run(adamfn.adam(), grads, lambda g, s, _: update(g, s, 1e-3, 0.9, 0.999, 1e-8))
    assert reference.worst_error(found, reference.updates(grads)) < 5e-7


@pytest.mark.parametrize("seed", range(3))
def test_hyperparameters_as_arrays(seed):
    grads = wide_gradients(seed)
    tx = adamfn.adam(*map(jnp.float32, (1e-3, 0.9, 0.999, 1e-8)))
    assert reference.worst_error(run(tx, grads), reference.updates(grads)) < 5e-7


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("scale", [1e15, 1e18, 1e-11])
def test_large_and_small_gradients(scale, backend):
    # As long as their squares are in the range of float32. A step from zero is an update.
    grads = np.float32(np.random.default_rng(2).standard_normal((STEPS, SIZE)) * scale)
    tx = adamfn.with_backend(adamfn.adam(eps=1e-25), backend)
    step = jax.jit(lambda g, state: adamfn.step(tx, g, state, jnp.zeros(SIZE)))
    found = run(tx, grads, lambda g, state, _: step(g, state))
    assert reference.worst_error(found, reference.updates(grads, eps=1e-25)) < 4e-7


@pytest.mark.parametrize(
    ("hyperparameters", "tolerance"),
    [
        # Measured, over three seeds: 2.4e-7 to 3.6e-7.
        ({"b1": 0.0}, 4e-7),
        ({"b1": 0}, 4e-7),
        ({"b1": 0.1, "b2": 0.1}, 4e-7),
        ({"b1": 0.5, "b2": 0.5}, 4e-7),
        ({"b1": 0, "b2": 0}, 4e-7),
        ({"eps": 1e-3}, 4e-7),
        ({"eps": 1}, 4e-7),
        ({"eps_root": 1e-8}, 4e-7),
        ({"eps": 0, "eps_root": 1}, 4e-7),
        # A longer memory holds the roundings of more steps. Measured: 4.1e-7 to 4.7e-7.
        ({"b1": 0.99, "b2": 0.9999}, 6e-7),
        # The coefficient of m is a product of two rounded numbers and the sum rounds once more.
        # Measured: 2.6e-7 to 3.8e-7.
        ({"nesterov": True}, 5e-7),
        ({"nesterov": True, "b1": 0}, 5e-7),
        ({"nesterov": True, "b1": 0.1, "eps_root": 1e-6}, 5e-7),
    ],
    ids=str,
)
def test_other_hyperparameters(hyperparameters, tolerance):
    grads = wide_gradients(3)
    tx = adamfn.adam(**hyperparameters)
    expected = reference.updates(grads, **hyperparameters)
    assert reference.worst_error(run(tx, grads, jax.jit(tx.update)), expected) < tolerance


@pytest.mark.parametrize("nesterov", [False, True])
def test_adamw(nesterov):
    # Some parameters are so large that the decay outweighs the ratio: the sum rounds once more.
    grads = wide_gradients(4)
    params = (np.random.default_rng(5).standard_normal(SIZE) * 50).astype(np.float32)
    tx = adamfn.adamw(weight_decay=0.1, nesterov=nesterov)
    expected = reference.updates(grads, weight_decay=0.1, params=params, nesterov=nesterov)
    for update in (tx.update, jax.jit(tx.update)):
        assert reference.worst_error(run(tx, grads, update, params), expected) < 5e-7


@pytest.mark.parametrize("b2", [0.999, 0.999999])
def test_the_first_step_of_a_slow_average(b2):
    # Here optax's 1 - b2^t, a difference in float32, is wrong in the fifth digit or the second.
    g = np.float32([[3.0, -1e-3, 2e-6]])
    tx = adamfn.adam(b2=b2, eps=0)
    assert reference.worst_error(run(tx, g), reference.updates(g, b2=b2, eps=0)) < 4e-7


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("count", [2**24 - 1, 2**24, 2**24 + 1, LAST - 2, LAST - 1, LAST])
def test_large_counts_need_no_correction(count, traced):
    b1, b2 = (jnp.float32(0.9), jnp.float32(0.999)) if traced else (0.9, 0.999)
    tx = adamfn.adam(0.5, b1, b2)
    moments, correction, rate = tx.init(jnp.zeros(2))
    moments = moments._replace(
        count=jnp.int32(count), mu=jnp.array([2.0, -4.0]), nu=jnp.array([4.0, 4.0])
    )
    state = moments, correction, rate
    for _ in range(3):
        updates, state = tx.update(state[0].mu, state)
        assert np.all(np.isfinite(updates))
    # The gradients are the average itself, so mu stays.
    nu = np.array([4.0, 4 * 0.999**3 + 16 * (1 - 0.999**3)])
    np.testing.assert_allclose(updates, -0.5 * np.array([2.0, -4.0]) / np.sqrt(nu), rtol=5e-7)
    assert state[0].count == min(count + 3, LAST)
    assert state[0].count.dtype == jnp.int32


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"b1": 0},
        {"b1": 0.1, "b2": 0.3},
        {"nesterov": True},
        {"eps": 1e-4, "eps_root": 1e-6},
    ],
    ids=str,
)
def test_double_precision(hyperparameters):
    grads = wide_gradients(6, np.float64)
    with jax.enable_x64(True):
        tx = adamfn.adam(**hyperparameters)
        for update in (tx.update, jax.jit(tx.update)):
            found = run(tx, grads, update)
            expected = reference.updates(grads, **hyperparameters)
            assert reference.worst_error(found, expected) < 1e-13


def test_adamw_in_double_precision():
    grads = wide_gradients(7, np.float64)
    with jax.enable_x64(True):
        params = np.linspace(-50, 50, SIZE)
        tx = adamfn.adamw(weight_decay=0.1)
        found = run(tx, grads, params=params)
        expected = reference.updates(grads, weight_decay=0.1, params=params)
        assert reference.worst_error(found, expected) < 1e-13


@pytest.mark.parametrize("nesterov", [False, True])
def test_complex_leaves(nesterov):
    # A product of complex numbers is a sum of two real ones: one rounding more than for reals.
    grads = wide_gradients(8, np.complex64)
    tx = adamfn.adam(nesterov=nesterov)
    expected = reference.updates(grads, nesterov=nesterov)
    for update in (tx.update, jax.jit(tx.update)):
        found = run(tx, grads, update)
        assert np.iscomplexobj(found)
        assert reference.worst_error(found, expected) < 5e-7


def test_complex_leaves_in_double_precision():
    grads = wide_gradients(9, np.complex128)
    with jax.enable_x64(True):
        found = run(adamfn.adam(), grads)
    assert reference.worst_error(found, reference.updates(grads)) < 1e-13


@pytest.mark.parametrize(
    ("peer", "hyperparameters"),
    [
        (optax.adam, {"eps": 1e-4}),
        (optax.adam, {"eps_root": 1e-6}),
        (optax.nadam, {"b1": 0.8}),
        (optax.adamw, {"weight_decay": 0.1}),
        (optax.nadamw, {"weight_decay": 0.1}),
    ],
)
def test_the_reference_is_what_optax_computes_in_double_precision(peer, hyperparameters):
    grads = wide_gradients(10, np.float64)[:20]
    params = np.linspace(-50, 50, SIZE)
    with jax.enable_x64(True):
        tx = peer(1e-3, **hyperparameters)
        found = run(tx, grads, jax.jit(tx.update), params)
    expected = reference.updates(
        grads, **hyperparameters, nesterov=peer in (optax.nadam, optax.nadamw), params=params
    )
    assert reference.worst_error(found, expected) < 1e-12


def test_injected_hyperparameters_are_exact():
    # Nine decades of gradients; 5e-7 of a step's largest update is eight float32 roundings.
    normal = np.random.default_rng(1).standard_normal
    scale = np.logspace(-6, 3, 512)
    gradients = np.float32(normal((60, 512)) * scale)
    tx = optax.inject_hyperparams(adamfn.adam)(learning_rate=1e-3)
    state = tx.init(jnp.zeros(512))
    _, found = jax.jit(
        lambda state, gs: jax.lax.scan(
            lambda s, g: tx.update(g, s, jnp.zeros(512))[::-1], state, gs
        )
    )(state, gradients)
    assert reference.worst_error(found, reference.updates(gradients)) < 5e-7


def trajectory(tx, gradients):
    """The sums of the updates, in float64 so that the sum's own roundings do not show."""
    zeros = jnp.zeros_like(gradients[0])

    def step(state, g):
        updates, state = tx.update(g, state, zeros)
        return state, updates

    _, moves = jax.jit(lambda gs: jax.lax.scan(step, tx.init(zeros), gs))(gradients)
    return np.cumsum(np.float64(moves), axis=0)


def apart(found, expected):
    """The largest distance at any step, relative to the way gone until then."""
    return np.max(np.max(np.abs(found - expected), 1) / np.max(np.abs(expected), 1))


@pytest.mark.parametrize("kind", ["noise", "constant"])
def test_1532_injected_hyperparameters_do_not_drift(kind):
    """Optax #1532: a trajectory with inject_hyperparams left the one without."""
    normal = np.random.default_rng(3).standard_normal
    noise = normal((1000, 64)) if kind == "noise" else np.ones((1000, 64))
    gradients = jnp.float32(noise * np.logspace(-4, 1, 64))

    def drift(adam):
        injected = optax.inject_hyperparams(adam)(learning_rate=1e-3)
        return apart(trajectory(injected, gradients), trajectory(adam(1e-3), gradients))

    assert drift(adamfn.adam) < 1e-6
    assert drift(optax.adam) > 3e-6
