# SPDX-License-Identifier: Apache-2.0
"""`average_weights`: the average of the weights that training makes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

DECAY, STEPS = 0.75, 6


def exact(weights):
    """The corrected average in float64 of weights after each step."""
    average = 0.0
    for w in weights:
        average = DECAY * average + (1 - DECAY) * np.asarray(w).astype(np.result_type(w, "d"))
    return average / (1 - DECAY ** len(weights))


def trained(tx, params, whole=lambda params, state: params):
    """The weights after each step, the last parameters, and the states of `step` and `update`."""

    def wave(k, p):
        return jnp.cos(k + jnp.arange(p.size, dtype="f")).reshape(p.shape).astype(p.dtype)

    grads = [jax.tree.map(partial(wave, k), params) for k in range(STEPS)]

    @jax.jit
    def train(grads, params, state):
        return adamfn.step(tx, grads, state, params)

    @jax.jit
    def train_by_optax(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for function in (train, train_by_optax):
        now, state, seen = params, tx.init(params), []
        for g in grads:
            now, state = function(g, now, state)
            seen.append(whole(now, state))
        yield seen, now, state


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_it_is_that_of_the_weights_after_each_step(moments):
    params = {
        "w": jnp.linspace(-1, 1, 4096).reshape(16, 256),
        "bfloat16": jnp.linspace(0.5, 1, 300).astype(jnp.bfloat16),
        "complex": jnp.ones(3, jnp.complex64),
        "scalar": jnp.float32(1.0),
        "frozen": None,
    }
    # A rate at which some bfloat16 weights stall: their average is not that of weights and updates.
    tx = adamfn.adamw(1e-3, moments=moments)
    tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), tx, adamfn.average_weights(DECAY))
    for seen, now, state in trained(tx, params):
        assert {x.dtype.name for x in jax.tree.leaves(state[2].average)} == {"float32", "complex64"}
        found = adamfn.averaged_weights(now, state)
        for name in ("w", "bfloat16", "complex", "scalar"):
            expected = exact([weights[name] for weights in seen])
            np.testing.assert_allclose(state[2].average[name], expected, rtol=1e-6, err_msg=name)
            assert found[name].dtype == now[name].dtype
        assert found["frozen"] is None


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_after_round_weights_it_is_that_of_the_whole_weights(bits):
    params = {"a": jnp.linspace(0.5, 1, 300).astype(jnp.bfloat16), "b": jnp.ones(3)}
    parts = adamfn.adam(1e-4), adamfn.round_weights(bits), adamfn.average_weights(DECAY)
    tx = adamfn.chain(*parts)
    plain, _ = list(trained(adamfn.chain(*parts[:2]), params, adamfn.whole_weights))
    for seen, now, state in trained(tx, params, adamfn.whole_weights):
        jax.tree.map(np.testing.assert_array_equal, seen, plain[0])
        found = adamfn.averaged_weights(adamfn.whole_weights(now, state), state)
        for name in params:
            expected = exact([weights[name] for weights in seen])
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)
            assert found[name].dtype == jnp.float32


def test_updates_are_those_without_it():
    params = {"w": jnp.linspace(-1, 1, 4096).reshape(16, 256), "b": jnp.ones(3, jnp.bfloat16)}
    plain = adamfn.adamw(1e-2, moments="8bit")
    averaging = adamfn.chain(plain, adamfn.average_weights())
    runs = [list(trained(tx, params)) for tx in (plain, averaging)]
    for (expected, *_), (found, *_) in zip(*runs, strict=True):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            # XLA may contract the last product and sum: a rounding of the largest weight, 1.
            np.testing.assert_allclose(a.astype("f"), b.astype("f"), rtol=2e-7, atol=1e-7)


def test_before_the_first_step_and_after_it_it_is_the_weights():
    params = jnp.array([1.0, -3.0])
    tx = adamfn.chain(adamfn.scale_by_lr(1.0), adamfn.average_weights(0.9999))
    state = tx.init(params)
    np.testing.assert_array_equal(adamfn.averaged_weights(params, state), params)
    moved, state = adamfn.step(tx, jnp.array([5.0, 1e-3]), state, params)
    np.testing.assert_allclose(adamfn.averaged_weights(moved, state), moved, rtol=3e-7)
    params.delete()
    assert jnp.all(jnp.isfinite(state[1].average))  # a copy


def test_a_step_that_is_skipped_leaves_it():
    params = jnp.ones(2)
    tx = adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.adam(0.1), adamfn.average_weights(0.5))
    state = tx.init(params)
    params, state = adamfn.step(tx, jnp.ones(2), state, params, loss=1.0)
    _, after = adamfn.step(tx, jnp.full(2, jnp.nan), state, params, loss=jnp.nan)
    np.testing.assert_array_equal(after[2].average, state[2].average)
    assert after[2].count == 1


def test_it_is_found_in_wrappers():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = adamfn.chain(adamfn.adam(0.5), adamfn.average_weights(0.5))
    wrapped = optax.MultiSteps(optax.masked(tx, {"a": True, "b": False}), 2)
    state = wrapped.init(params)
    for _ in range(4):
        updates, state = wrapped.update({"a": jnp.ones(2), "b": jnp.zeros(2)}, state, params)
        params = optax.apply_updates(params, updates)
    found = adamfn.averaged_weights(params, state)
    np.testing.assert_allclose(found["a"], (0.5 * 0.5 + 0.0) / 1.5, rtol=1e-5)  # of 0.5 and 0
    assert found["b"] is params["b"]


def test_packed_leaves_are_averaged():
    params = {"a": jnp.ones(2), "b": jnp.linspace(0, 1, 5)}
    plain = adamfn.chain(adamfn.adam(0.1), adamfn.average_weights(DECAY))
    tx = adamfn.packed(plain)
    (_, now, state), _ = trained(tx, params)
    with pytest.raises(ValueError, match=r"adamfn.repack\(tx, state, params\)"):
        adamfn.averaged_weights(now, state)
    found = adamfn.averaged_weights(now, adamfn.repack(tx, state, now))
    (_, now, state), _ = trained(plain, params)
    for name, x in adamfn.averaged_weights(now, state).items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6)


def test_it_is_last():
    for parts in (
        (adamfn.average_weights(), adamfn.adam()),
        (adamfn.average_weights(), adamfn.round_weights()),
        (adamfn.average_weights(), adamfn.average_weights()),
        (adamfn.adam(), adamfn.average_weights(), optax.scale(2.0)),
    ):
        with pytest.raises(ValueError, match=r"average_weights stands before .* Put it last"):
            adamfn.chain(*parts)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="decay is 1"):
        adamfn.average_weights(1.0)
    params = {"w": jnp.ones(2)}
    tx = adamfn.average_weights()
    with pytest.raises(ValueError, match="average_weights: update got no params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="the state has no average of these parameters"):
        adamfn.averaged_weights(params, adamfn.adam().init(params))
    with pytest.raises(ValueError, match="no average of these parameters and their shapes"):
        adamfn.averaged_weights({"w": jnp.ones(3)}, tx.init(params))
