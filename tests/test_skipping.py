# SPDX-License-Identifier: Apache-2.0
"""skip_outliers: what is not taken, and what stays as it was."""

import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(())}
GRADS = jax.tree.map(lambda p: 0.1 + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), PARAMS)


def train(tx, losses, params=PARAMS, state=None, scale=lambda k: 1.0):
    step = jax.jit(lambda g, s, p, extra: adamfn.step(tx, g, s, p, **extra))
    state = tx.init(params) if state is None else state
    for k, loss in enumerate(losses):
        grads = jax.tree.map(lambda g, k=k: g * scale(k), GRADS)
        params, state = step(grads, state, params, {} if loss is None else {"loss": loss})
    return params, state


def usual(number):
    return [2 + 0.1 * (k % 3) for k in range(number)]


INNER = {
    "adamw": adamfn.adamw(0.1),
    "nadam": adamfn.nadam(0.1),
    "8bit": adamfn.adamw(0.1, moments="8bit"),
    "schedule": adamfn.adam(optax.linear_schedule(0.1, 0.0, 100)),
}


@pytest.mark.parametrize("name", INNER)
def test_a_step_that_is_not_taken_leaves_everything(name):
    tx = adamfn.chain(adamfn.skip_outliers(), INNER[name])
    params = {**PARAMS, "large": jnp.ones((32, 256))} if name == "8bit" else PARAMS
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    step = jax.jit(lambda s, p, loss: adamfn.step(tx, grads, s, p, loss=loss))
    for loss in usual(66):
        params, state = step(state, params, loss)
    assert state[0].skipped == 0
    after, held = step(state, params, 9.0)
    assert held[0].skipped == 1
    assert not held[0].taken
    chex.assert_trees_all_equal(after, params)
    chex.assert_trees_all_equal(held[1], state[1])
    # And goes on as if it had not been: the bound is a little wider.
    chex.assert_trees_all_equal(step(held, after, 2.0)[0], step(state, params, 2.0)[0])


def test_update_gives_zeros():
    tx = adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.adam())
    _, state = train(tx, usual(66))
    updates, _ = tx.update(GRADS, state, PARAMS, loss=9.0)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


@pytest.mark.parametrize(("last", "skipped"), [(2.1, 0), (2.5, 0), (2.7, 1), (0.0, 0)])
def test_the_bound_is_of_one_side(last, skipped):
    losses = usual(66)
    bound = np.mean(losses) + 6 * np.std(losses, ddof=1)
    assert 2.5 < bound < 2.7
    _, state = train(adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.adam()), [*losses, last])
    assert state[0].skipped == skipped


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e-19, 1.0, 1e19, 1e20, 1e36, -1e20])
def test_losses_of_any_size(scale):
    # Squares of deviations overflow or vanish. Beside 1e4 they are lost in a sum of losses.
    rng = np.random.default_rng(0)
    shift = 1e4 if scale == 1 else 1.0
    losses = np.float32(scale * (shift + 0.1 * rng.standard_normal(200)))
    losses[60::7] += np.float32(np.abs(scale) * 0.1 * rng.uniform(2, 6, 20))
    gate = adamfn.skip_outliers(["loss"], window=16, sigmas=2.5)
    tx = adamfn.chain(gate, adamfn.scale_by_lr(1.0))

    def step(state, loss):
        return (state := tx.update({}, state, loss=loss)[1]), state[0].taken

    _, taken = jax.jit(lambda losses: jax.lax.scan(step, tx.init({}), losses))(losses)
    exact = losses.astype(np.float64) / abs(scale)
    windows = [exact[max(k - 16, 0) : k] for k in range(200)]
    expected = [
        k < 19 or x <= window.mean() + 2.5 * window.std(ddof=1)
        for k, (x, window) in enumerate(zip(exact, windows, strict=True))
    ]
    np.testing.assert_array_equal(taken, expected)
    assert 5 < np.sum(~taken) < 40


def test_the_first_steps_are_taken():
    tx = adamfn.chain(adamfn.skip_outliers(["loss"], window=40), adamfn.adam())
    _, state = train(tx, [*usual(18), 1e6])
    assert state[0].skipped == 0
    _, state = train(tx, [*usual(19), 1e6])
    assert state[0].skipped == 1


def test_the_window_forgets():
    tx = adamfn.chain(adamfn.skip_outliers(["loss"], window=20), adamfn.adam())
    _, state = train(tx, [9.0] * 10 + usual(20) + [9.0])
    assert state[0].skipped == 1


@pytest.mark.parametrize("loss", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_skipped_and_enters_no_window(loss):
    tx = adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.adam())
    _, state = train(tx, [*usual(3), loss])
    assert state[0].skipped == 1
    assert state[0].seen == 3
    assert jnp.all(jnp.isfinite(state[0].recent))


def test_gradients_that_are_nan_leave_no_trace():
    tx = adamfn.chain(adamfn.skip_outliers(["grad_norm"]), adamfn.adamw())
    params, state = train(tx, [None] * 2, scale=lambda k: np.nan if k else 1.0)
    assert state[0].skipped == 1
    chex.assert_tree_all_finite((params, state))


WATCHED = [[["grad_norm"], ["loss"]], [["loss"], ["grad_norm"]]]


@pytest.mark.parametrize("watched", WATCHED, ids=["norm, loss", "loss, norm"])
def test_two_gates_must_both_be_open(watched):
    tx = adamfn.chain(*map(adamfn.skip_outliers, watched), adamfn.adam(0.1))
    step = jax.jit(lambda g, s, p, loss: adamfn.step(tx, g, s, p, loss=loss))
    params, state = step(GRADS, tx.init(PARAMS), PARAMS, 2.0)
    bad = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    for grads, loss in ((bad, 2.0), (GRADS, jnp.nan), (bad, jnp.nan)):
        after, held = step(grads, state, params, loss)
        chex.assert_trees_all_equal(after, params)
        chex.assert_trees_all_equal(held[2], state[2])
        updates, _ = tx.update(grads, state, params, loss=loss)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    after, taken = step(GRADS, state, params, 2.0)
    assert (taken[2][0].count, taken[0].skipped, taken[1].skipped) == (2, 0, 0)
    assert jnp.all(after["w"] != params["w"])


def test_what_other_stages_remember_stays():
    tx = adamfn.chain(
        adamfn.skip_outliers(["loss"]),
        adamfn.clip_by_global_norm(1.0),
        adamfn.scale_by_nesterov_moments(),
        adamfn.scale_by_lr(lambda count: 1.0 / (1 + count)),
    )
    params, state = train(tx, [2.0, 2.0])
    _, held = train(tx, [jnp.nan], params, state, scale=lambda k: 5.0)
    chex.assert_trees_all_equal(held[1:], state[1:])
    assert (held[2].count, held[3].learning_rate, held[0].skipped) == (2, 0.5, 1)


def test_packed():
    plain = adamfn.chain(adamfn.skip_outliers(["grad_norm"]), adamfn.adamw(0.1))
    kept = adamfn.packed(plain)

    def scale(k):
        return 100.0 if k == 68 else 1 + 0.1 * (k % 3)

    params, state = train(plain, [None] * 70, scale=scale)
    found, packed_state = train(kept, [None] * 70, scale=scale)
    assert state[0].skipped == packed_state[0].skipped == 1
    chex.assert_trees_all_close(found, params, rtol=1e-5)


def test_a_loss_is_asked_for():
    tx = adamfn.chain(adamfn.skip_outliers(), adamfn.adam())
    with pytest.raises(ValueError, match="skip_outliers: update got no loss"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"watched": []}, "watched is []"),
        ({"watched": "loss"}, "watched is 'loss'"),
        ({"watched": ["loss", "time"]}, "watched is ['loss', 'time']"),
        ({"window": 1}, "window is 1"),
        ({"sigmas": -1}, "sigmas is -1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as caught:
        adamfn.skip_outliers(**arguments)
    assert str(caught.value).startswith(message)


def test_a_stage_that_counts_nothing_behind_it():
    tx = adamfn.chain(adamfn.skip_outliers(["loss"]), adamfn.scale_by_lr(lambda count: count))
    params, state = train(tx, usual(66))
    _, held = train(tx, [9.0], params, state)
    assert (held[0].count, held[0].skipped, held[1].learning_rate) == (66, 1, 65)


def test_its_state_is_exported():
    parts = adamfn.skip_outliers(["grad_norm"]), adamfn.clip_by_global_norm(1.0)
    tx = adamfn.chain(*parts, adamfn.scale_by_lr(0.1))
    state = tx.init(PARAMS)
    exported = jax.export.export(jax.jit(tx.update))(GRADS, state, PARAMS)
    read = jax.export.deserialize(exported.serialize())
    chex.assert_trees_all_close(read.call(GRADS, state, PARAMS), tx.update(GRADS, state, PARAMS))


@pytest.mark.parametrize("watched", [-1, "loss", ["los"], [["loss"]]])
def test_what_is_watched_is_a_list_of_names(watched):
    with pytest.raises(ValueError, match="expected a list of 'loss', 'grad_norm' or both"):
        adamfn.skip_outliers(watched)


@pytest.mark.parametrize(
    ("loss", "found"), [(jnp.ones(3), r"float32\[3\]"), ("2.5", "a str"), (1j, "complex")]
)
def test_a_loss_that_is_no_scalar_is_refused(loss, found):
    tx, params = adamfn.skip_outliers(["loss"]), jnp.ones(2)
    with pytest.raises(TypeError, match=f"skip_outliers: loss is .*{found}.*; expected a real"):
        tx.update(params, tx.init(params), loss=loss)


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_only_steps_that_are_not_finite(dtypes):
    """Where updates are wider than gradients, which `optax.apply_if_finite` refuses."""
    rounds = [adamfn.round_weights(24)] if dtypes[1] == "bfloat16" else []
    watch = adamfn.skip_outliers(["grad_norm"], sigmas=math.inf)
    tx = adamfn.chain(watch, adamfn.adam(2.0**-12), *rounds)
    params = jnp.ones((4, 8), dtypes[1])
    state, step = tx.init(params), jax.jit(lambda g, s, p: adamfn.step(tx, g, s, p))
    for k in range(100):
        size = {7: np.nan, 70: np.inf, 90: 1000.0}.get(k, 1.0)
        params, state = step(jnp.full((4, 8), size, dtypes[0]), state, params)
    assert (int(state[0].skipped), int(state[1][0].count)) == (2, 98)
    # Constant gradients move a weight by the rate; the outlier and its memory by less than it does.
    whole = adamfn.whole_weights(params, state)
    assert jnp.all(abs(whole - (1 - 90 * 2.0**-12)) < 8 * 2.0**-12)
