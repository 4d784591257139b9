# SPDX-License-Identifier: Apache-2.0
"""A chain's step: through optax's parts, beside `update`, with copies of transformations."""

import copy
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

RECIPES = ("adam", "adamw", "amsgrad", "nadam", "radam", "adamax", "lazy_adam")
PARAMS = {"kernel": jnp.full((64, 256), 0.5), "bias": jnp.full(3, -0.5)}


def gradients(step, params=PARAMS):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


def by_hand(tx, steps=3, params=PARAMS, **extra):
    state, update = tx.init(params), jax.jit(tx.update)
    for k in range(steps):
        updates, state = update(gradients(k), state, params, **extra)
        params = adamfn.apply_updates(params, updates)
    return params, state


def by_step(tx, steps=3, params=PARAMS, **extra):
    state, step = tx.init(params), jax.jit(partial(adamfn.step, tx))
    for k in range(steps):
        params, state = step(gradients(k), state, params, **extra)
    return params, state


def close(found, expected):
    # The sum is taken before the update is rounded, or after: at each of three steps a rounding of
    # a parameter about 1.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=3e-7, atol=1.8e-7), found, expected)


@pytest.mark.parametrize(
    ("recipe", "moments", "backend"),
    [
        *((name, "float32", "auto") for name in RECIPES),
        *((name, "8bit", "auto") for name in ("adamw", "amsgrad", "lazy_adam")),
        ("adamw", "8bit", "xla"),
    ],
)
def test_step_is_update_and_apply_updates(recipe, moments, backend):
    tx = adamfn.with_backend(getattr(adamfn, recipe)(0.1, moments=moments), backend)
    (params, state), (expected, own) = by_step(tx, 1), by_hand(tx, 1)
    close(params, expected)
    jax.tree.map(np.testing.assert_array_equal, state, own)


CLIPPED = adamfn.chain(optax.clip_by_global_norm(1.0), adamfn.adamw(0.1))


def test_through_a_part_of_optaxs():
    close(by_step(CLIPPED), by_hand(CLIPPED))
    text = jax.jit(partial(adamfn.step, CLIPPED)).lower(PARAMS, CLIPPED.init(PARAMS), PARAMS)
    if adamfn.backend("cpu").name == "native":
        assert text.compile().as_text().count('custom_call_target="adamfn_step') == 1


@pytest.mark.parametrize(
    "tx",
    [
        adamfn.chain(adamfn.adam(0.1), optax.scale(0.5)),
        adamfn.chain(adamfn.chain(optax.clip(0.5), adamfn.adam(0.1))),
        optax.chain(optax.clip(0.5), adamfn.adam(0.1)),
        optax.adam(0.1),
        optax.MultiSteps(adamfn.adam(0.1), 2),
        optax.masked(adamfn.adam(0.1), {"kernel": True, "bias": False}),
        optax.partition(
            {"a": adamfn.adam(0.1), "b": adamfn.adamw(0.2)}, {"kernel": "a", "bias": "b"}
        ),
        adamfn.chain(),
    ],
)
def test_other_transformations(tx):
    close(by_step(tx), by_hand(tx))


def test_the_updates_are_returned_where_they_are_asked_for():
    for tx in (adamfn.adamw(0.1), adamfn.adamw(0.1, moments="8bit"), CLIPPED, optax.adam(0.1)):
        state = tx.init(PARAMS)
        params, after, updates = adamfn.step(tx, PARAMS, state, PARAMS, return_updates=True)
        expected, own = tx.update(PARAMS, state, PARAMS)
        close((params, after, updates), (adamfn.apply_updates(PARAMS, expected), own, expected))


def test_a_rate_reaches_through():
    for tx in (adamfn.adam(0.1), CLIPPED):
        close(by_step(tx, learning_rate=0.5), by_hand(tx, learning_rate=0.5))
        moved, state = by_step(tx, 1, learning_rate=0.0)
        if tx is not CLIPPED:
            jax.tree.map(np.testing.assert_array_equal, moved, PARAMS)
        assert optax.tree.get(state, "learning_rate") == 0


@pytest.mark.parametrize("name", ["lr", "learningrate", "rounding", "value"])
def test_what_no_part_takes_is_refused(name):
    for tx in (adamfn.adam(0.1), CLIPPED, adamfn.packed(adamfn.adam(0.1))):
        with pytest.raises(
            TypeError, match=f"step: found the argument {name}=3, .* learning_rate="
        ):
            adamfn.step(tx, PARAMS, tx.init(PARAMS), PARAMS, **{name: 3})


def test_an_equinox_module():
    import equinox as eqx

    model = eqx.nn.MLP(3, 2, 5, 1, key=jax.random.key(0))
    tx = adamfn.adamw(0.1)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(3)) ** 2))(model)
    moved, _ = eqx.filter_jit(partial(adamfn.step, tx))(grads, state, model)
    updates, _ = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    close(
        eqx.filter(moved, eqx.is_inexact_array),
        eqx.filter(eqx.apply_updates(model, updates), eqx.is_inexact_array),
    )
    assert moved.activation is model.activation


def test_leaves_without_gradients_stay():
    tx = adamfn.adam(0.1)
    state = tx.init({**PARAMS, "bias": None})
    params, _ = adamfn.step(tx, {**gradients(0), "bias": None}, state, PARAMS)
    np.testing.assert_array_equal(params["bias"], PARAMS["bias"])
    assert np.all(params["kernel"] != PARAMS["kernel"])


def copies(tx):
    yield copy.copy(tx)
    yield copy.deepcopy(tx)
    yield jax.tree.map(lambda part: part, tx)
    yield tx._replace(init=tx.init)
    yield optax.GradientTransformationExtraArgs(*tx)


def has_own_step(tx):
    params = {"w": jnp.ones(3)}
    jaxpr = jax.make_jaxpr(partial(adamfn.step, tx))(params, tx.init(params), params)
    return not any("_add" in str(eqn.params.get("name")) for eqn in jaxpr.eqns)


def test_copies_keep_the_step():
    for tx in copies(adamfn.adam(0.1)):
        assert has_own_step(tx)
        close(by_step(tx), by_step(adamfn.adam(0.1)))


def test_a_wrapper_of_update_has_no_step_of_its_own():
    tx = adamfn.adam(0.1)

    @wraps(tx.update)
    def halved(updates, state, params=None, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(lambda u: u / 2, updates), state

    other = tx._replace(update=halved)
    assert not has_own_step(other)
    close(by_step(other), by_hand(other))
    chained = adamfn.chain(other)
    close(by_step(chained)[0], by_hand(other)[0])


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("rate", [1e-7, 3e-8])
def test_small_float16_updates_are_not_lost(rate, backend):
    params, g = jnp.zeros(1000), jnp.full(1000, 0.5, jnp.float16)
    tx = adamfn.with_backend(adamfn.adam(rate), backend)
    state, own, moved, stepped = tx.init(params), tx.init(params), params, params
    for _ in range(10):
        updates, state = tx.update(g, state, moved)
        moved = adamfn.apply_updates(moved, updates)
        stepped, own = adamfn.step(tx, g, own, stepped)
    np.testing.assert_allclose(moved, -10 * rate, rtol=1e-5)  # float16 would give 93% or less
    np.testing.assert_allclose(stepped, -10 * rate, rtol=1e-5)


def test_bfloat16_updates_are_rounded_once():
    g = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.bfloat16)
    tx = adamfn.adam(0.3)
    wide, _ = tx.update(g.astype(jnp.float32), tx.init(g))
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, wide.astype(jnp.bfloat16))
