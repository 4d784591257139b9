# SPDX-License-Identifier: Apache-2.0
"""scale_by_lr: number, array, schedule, override, and the rate kept in the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

LAST = 2**31 - 1


def steps(tx, count, **extra):
    """Updates of a gradient of 1, and the state's rate (None if it has none), at each step."""
    state = tx.init(jnp.zeros(()))
    found = []
    for _ in range(count):
        u, state = tx.update(jnp.ones(()), state, **extra)
        rate = optax.tree.get(state, "learning_rate")
        found.append((float(u), rate if rate is None else float(rate)))
    return found


@pytest.mark.parametrize("lr", [0.25, np.float32(0.25), np.array(0.25)], ids=repr)
def test_a_constant(lr):
    assert steps(adamfn.scale_by_lr(lr), 2) == [(-0.25, 0.25)] * 2


@pytest.mark.parametrize("lr", [jnp.float32(0.25), jnp.bfloat16(0.25)], ids=repr)
def test_a_rate_given_as_an_array_is_its_givers(lr):
    assert steps(adamfn.scale_by_lr(lr), 2) == [(-0.25, None)] * 2


def test_integers_and_zero():
    assert steps(adamfn.scale_by_lr(1), 1) == [(-1, 1)]
    assert steps(adamfn.scale_by_lr(0), 1) == [(0, 0)]
    assert steps(adamfn.scale_by_lr(jnp.int32(2)), 1) == [(-2, None)]


def test_the_default_is_the_papers():
    assert steps(adamfn.scale_by_lr(), 1) == [(np.float32(-1e-3), np.float32(1e-3))]


def test_a_schedule_is_asked_with_the_steps_taken_so_far():
    asked = []

    def schedule(count):
        asked.append((int(count), count.dtype))
        return 1.0 / (1 + count)

    rates = [1.0, 0.5, np.float32(1 / 3)]
    assert steps(adamfn.scale_by_lr(schedule), 3) == [(-rate, rate) for rate in rates]
    assert [count for count, _ in asked] == [0, 0, 0, 1, 2]  # twice by init, for the state
    assert {dtype for _, dtype in asked} == {jnp.dtype(jnp.int32)}


def test_an_optax_schedule():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 5)
    found = steps(adamfn.scale_by_lr(schedule), 6)
    np.testing.assert_allclose([rate for _, rate in found], [schedule(t) for t in range(6)])
    np.testing.assert_allclose([u for u, _ in found], [-schedule(t) for t in range(6)])


def test_the_first_state_holds_the_rate_to_come():
    assert adamfn.scale_by_lr(0.5).init(None).learning_rate == 0.5
    count, rate, written = adamfn.scale_by_lr(lambda count: 0.75 - count).init(None)
    assert (rate, written, count) == (0.75, 0.75, 0)
    assert (count.dtype, rate.dtype) == (jnp.int32, jnp.float32)


def test_an_override_is_for_one_step():
    tx = adamfn.scale_by_lr(lambda count: 1.0 + count)
    g = jnp.ones(())
    state = tx.init(g)
    seen = []
    for override in (None, 0.25, jnp.float32(0.5), lambda count: 100.0 * count, None, 0):
        u, state = tx.update(g, state, learning_rate=override)
        seen.append((float(-u), float(state.learning_rate)))
    assert seen == [(1, 1), (0.25, 0.25), (0.5, 0.5), (300, 300), (5, 5), (0, 0)]


SETS = {
    "a constant": (2.0, [2, 2, 0.25, 0.25, 0.25]),
    "a schedule": (lambda count: 1.0 + count, [1, 2, 0.25, 0.25, 0.25]),
}


@pytest.mark.parametrize("value", [0.25, np.float32(0.25), jnp.float32(0.25)], ids=repr)
@pytest.mark.parametrize("name", SETS)
def test_a_rate_that_is_set_in_the_state_is_the_rate_from_then_on(name, value):
    rate, expected = SETS[name]
    tx = adamfn.chain(adamfn.scale_by_lr(rate))
    update, g = jax.jit(tx.update), jnp.ones(())
    state, found = tx.init(g), []
    for k in range(5):
        if k == 2:
            state = optax.tree.set(state, learning_rate=value)
        u, state = (tx.update if k == 3 else update)(g, state)
        found.append(float(-u))
        assert optax.tree.get(state, "learning_rate") == found[-1]
    assert found == expected
    # Two ways back to the rate of the transformation.
    written = optax.tree.get(state, "written")
    assert -update(g, optax.tree.set(state, learning_rate=written))[0] == (2 if rate == 2 else 6)
    _, state = tx.update(g, state, learning_rate=0.5)
    assert -update(g, state)[0] == (2 if rate == 2 else 7)


def test_a_rate_is_set_before_the_first_step():
    tx = adamfn.adam(lambda count: 1.0 + count)
    state = optax.tree.set(tx.init(jnp.ones(1)), learning_rate=0.125)
    updates, state = tx.update(jnp.ones(1), state)
    np.testing.assert_allclose(updates, [-0.125], rtol=3e-7)  # of Adam's ratio
    assert state[-1].learning_rate == 0.125


def test_a_restored_state_goes_on_with_a_new_rate():
    """A new rate in the code is meant; one that was set by hand stays, as it is nowhere else."""
    old, new = adamfn.scale_by_lr(2.0), adamfn.scale_by_lr(3.0)
    g = jnp.ones(())
    state = old.init(g)
    for saved in (state, old.update(g, state)[1], old.update(g, state, learning_rate=5.0)[1]):
        updates, after = new.update(g, jax.tree.map(np.array, saved))
        assert (-updates, after.learning_rate, after.written) == (3, 3, 3)
    _, state = old.update(g, optax.tree.set(state, learning_rate=7.0))
    assert -new.update(g, jax.tree.map(np.array, state))[0] == 7


def test_a_rate_that_was_not_a_number_was_not_set():
    tx = adamfn.scale_by_lr(lambda count: jnp.where(count > 1, 1.0, jnp.nan))
    state = tx.init(jnp.ones(1))
    for _ in range(3):
        updates, state = tx.update(jnp.ones(1), state)
    np.testing.assert_array_equal(updates, [-1.0])


@pytest.mark.parametrize(
    ("value", "found"), [(jnp.ones(2), "an array of shape"), ("0.1", "'0.1'"), (-1, "-1.0")]
)
def test_a_rate_that_is_set_is_checked(value, found):
    tx = adamfn.scale_by_lr()
    state = optax.tree.set(tx.init(jnp.ones(1)), learning_rate=value)
    with pytest.raises((TypeError, ValueError), match=f"the state's learning_rate is {found}"):
        tx.update(jnp.ones(1), state)


def test_the_rate_of_a_giver_is_set_where_it_is():
    tx = adamfn.scale_by_lr(jnp.float32(0.25))
    with pytest.raises(KeyError, match="learning_rate"):
        optax.tree.set(tx.init(jnp.ones(1)), learning_rate=1.0)


@pytest.mark.parametrize("make", [adamfn.adam, adamfn.adamw])
def test_an_override_goes_through_chains_and_compiles_nothing(make):
    tx = adamfn.chain(adamfn.chain(make(0.1)))
    g = params = {"w": jnp.array([1.0, -2.0])}
    traced = []

    @jax.jit
    def update(state, lr):
        traced.append(lr)
        return tx.update(g, state, params, learning_rate=lr)

    state = tx.init(params)
    once, after = update(state, 0.5)
    twice, after_twice = update(state, 1.0)
    assert len(traced) == 1
    np.testing.assert_allclose(2 * once["w"], twice["w"], rtol=1e-6)
    assert after[0][0][-1].learning_rate == 0.5
    assert after_twice[0][0][-1].learning_rate == 1.0


def test_a_traced_rate():
    @jax.jit
    def update(lr):
        tx = adamfn.scale_by_lr(lr)
        return tx.update(jnp.ones(2), tx.init(jnp.ones(2)))

    updates, state = update(0.25)
    np.testing.assert_array_equal(updates, [-0.25, -0.25])
    assert state._fields == ("count",)


def test_a_narrow_leaf_does_not_round_the_rate():
    # bfloat16 has no 1.00390625; 255 times it rounds to 256.
    rate = 1 + 2**-8
    g = jnp.array([255.0], jnp.bfloat16)
    tx = adamfn.scale_by_lr(rate)
    updates, state = tx.update(g, tx.init(g))
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates, jnp.float32([-255 * rate]).astype(jnp.bfloat16))
    assert state.learning_rate == rate


@pytest.mark.parametrize("count", [LAST - 1, LAST])
def test_the_count_stops_at_its_last(count):
    tx = adamfn.scale_by_lr(lambda count: jnp.where(count > 0, 1.0, jnp.nan))
    state = tx.init(jnp.ones(1))._replace(count=jnp.int32(count))
    updates, state = tx.update(jnp.ones(1), state)
    np.testing.assert_array_equal(updates, [-1.0])
    assert state.count == LAST
    assert state.count.dtype == jnp.int32
