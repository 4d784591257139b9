# SPDX-License-Identifier: Apache-2.0
"""A look changes no bit of the training and copies nothing, as a user's programs are compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn import monitor

WIDTH, HIDDEN, EXAMPLES = 16, 128, 256


TX = adamfn.adamw(1e-2, moments="8bit")
PARAMS = {"wide": jnp.ones((WIDTH, 256)) / 256, "bias": jnp.zeros(256)}  # codes, and float32


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["wide"] + params["bias"])
    return jnp.mean((hidden - jnp.sum(y, axis=1, keepdims=True)) ** 2)


@functools.cache
def trained(way, every=None):
    """Seven steps, and those that were looked at; a look `every` so many, or none."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        if way == "in order":
            return monitor.step(TX, grads, state, params, every=every)
        seen = every and monitor.observe(TX, grads, state, params, every=every)
        if way == "step":
            return *adamfn.step(TX, grads, state, params), seen
        updates, state = TX.update(grads, state, params)
        return adamfn.apply_updates(params, updates), state, seen

    run, steps = jax.tree.map(jnp.copy, (PARAMS, TX.init(PARAMS))), []
    for number in range(7):
        random = np.random.default_rng(number)
        batch = [random.normal(size=(EXAMPLES, n)).astype(np.float32) for n in (WIDTH, 4)]
        *run, seen = step(*run, batch)
        steps.append(seen and int(seen.step))
    return jax.tree.map(np.asarray, run), steps


@pytest.mark.parametrize(("every", "way"), [(1, "update"), (3, "step"), (3, "in order")])
def test_a_look_changes_no_bit_of_the_training(every, way):
    plain, _ = trained("update" if way == "update" else "step")
    looked, steps = trained(way, every)
    assert steps == [number if number % every == 1 % every else 0 for number in range(1, 8)]
    for a, b in zip(*map(jax.tree.leaves, (plain, looked)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(looked[0]["wide"], PARAMS["wide"])


def copies_in_a_loop(observed):
    """How many arrays of the parameter's size a loop of training steps copies at each step."""
    tx = adamfn.adamw(1e-2)
    params = jnp.ones((WIDTH, HIDDEN))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def steps(params, state, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean((batch @ p) ** 2))(params)
            *carry, seen = observed(tx, grads, state, params)
            return tuple(carry), seen

        return jax.lax.scan(step, (params, state), batches)

    batches = jnp.ones((5, EXAMPLES, WIDTH))
    program = steps.lower(params, tx.init(params), batches).compile().as_text()
    body = next(part for part in program.split("\n\n") if "adamfn_step" in part)
    return body.count(f"= f32[{WIDTH},{HIDDEN}]{{1,0}} copy(")


@pytest.mark.optimized  # compiled text
def test_a_step_that_waits_for_its_look_copies_nothing():
    def in_no_order(tx, grads, state, params):
        seen = monitor.observe(tx, grads, state, params, every=10)
        return *adamfn.step(tx, grads, state, params), seen

    assert copies_in_a_loop(in_no_order) >= 3  # what a copy looks like: the moments, the weights
    assert copies_in_a_loop(functools.partial(monitor.step, every=10)) == 0
