# SPDX-License-Identifier: Apache-2.0
"""Numbers that people report of Adam: huge gradients, derivatives, decays that grow weights."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

MEMBERS = {
    "adam": adamfn.adam,
    "nesterov": lambda **own: adamfn.adam(nesterov=True, **own),
    "adamw": adamfn.adamw,
    "amsgrad": adamfn.amsgrad,
    "adamax": adamfn.adamax,
    "nadam": adamfn.nadam,
    "radam": adamfn.radam,
    "lazy_adam": adamfn.lazy_adam,
}


# One gradient whose square overflows made its element NaN for ever (pytorch 40345 and its kin).


@cache
def member(name):
    return MEMBERS[name](learning_rate=1e-3)


@cache
def compiled(tx):
    return jax.jit(lambda g, params, state: adamfn.step(tx, g, state, params))


def after_a_huge_gradient(tx, shape, huge, dtype=np.float32, steps=4):
    """Parameters and state when one element's first gradient was huge, and all others are 1."""
    params = g = np.ones(shape, dtype)
    state, first = tx.init(params), np.copy(g)
    first[0, 0] = huge
    for gradient in (first, *[g] * (steps - 1)):
        params, state = compiled(tx)(gradient, params, state)
    return params, state


@pytest.mark.parametrize("huge", [1e15, 1e19, 1e20, 1e38, -3e38])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_huge_gradient_moves_its_element_as_in_exact_arithmetic(name, huge):
    # radam's first steps are as long as the gradient; without them it is its peers' equal.
    params, _ = after_a_huge_gradient(member(name), (2, 3), huge)
    if name == "radam":
        assert np.all(np.isfinite(params))
        return
    # In float64, where nothing overflows, by the same transformation: its element alone is huge.
    with jax.enable_x64(True):
        exact, _ = after_a_huge_gradient(member(name), (2, 3), huge, np.float64)
    np.testing.assert_allclose(params, exact, rtol=1e-6)
    assert abs(params[0, 0] - 1) > 1e-3


NATIVE = ["float32", "bfloat16", "8bit"]  # on CPU all else is XLA's


@pytest.mark.parametrize(
    ("format", "backend"),
    [*((name, "auto") for name in adamfn.formats.FORMATS), *((name, "xla") for name in NATIVE)],
)
def test_a_huge_gradient_in_every_format(format, backend):
    tx = adamfn.with_backend(adamfn.adamw(1e-3, moments=format), backend)
    for huge in (1e38, -1e20):
        params, state = after_a_huge_gradient(tx, (128, 128), huge)
        for leaf in jax.tree.leaves((params, state)):
            assert np.all(np.isfinite(np.asarray(leaf, np.float32)))
        assert not np.array_equal(params[3:, 3:], jnp.ones((125, 125)))  # the others move on


@pytest.mark.parametrize("format", adamfn.formats.FORMATS)
def test_a_whole_leaf_of_huge_gradients(format):
    # Their mean, as `factored` and `blockmean` take it, would overflow too.
    tx = adamfn.adam(1e-3, moments=format)
    params = jnp.ones((256, 256), jnp.bfloat16)
    state = tx.init(params)
    for _ in range(3):
        g = jnp.full(params.shape, 3e38, jnp.bfloat16)
        updates, state = tx.update(g, state, params)
        np.testing.assert_allclose(np.asarray(updates, np.float32), -1e-3, rtol=0.02)


@pytest.mark.parametrize("format", adamfn.formats.FORMATS)
def test_huge_gradients_have_not_outgrown_their_averages(format):
    tx = adamfn.chain(
        adamfn.scale_by_moments(moments=format),
        adamfn.bias_correct(),
        adamfn.clip_updates(),
        adamfn.scale_by_lr(1.0),
    )
    params = jnp.ones((128, 128))
    for size in (1e16, 1e30):
        updates, _ = jax.jit(tx.update)(params * size, tx.init(params), params)
        np.testing.assert_allclose(updates, -1, rtol=0.02)  # of 8 bits: half a code


def test_a_huge_complex_gradient_keeps_its_direction():
    tx = adamfn.adam(1.0)
    g = jnp.array([3e38 - 3e38j, 1e20 + 1e10j, 1 + 1j])
    updates, state = tx.update(g, tx.init(g), g)
    for _ in range(2):
        updates, state = tx.update(jnp.ones_like(g), state, g)
    assert np.all(np.isfinite(updates))
    first, _ = tx.update(g, tx.init(g), g)
    np.testing.assert_allclose(
        first, -np.array([1 - 1j, 1 + 1e-10j, 1 + 1j]) / [2**0.5, 1, 2**0.5], rtol=1e-6
    )


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_what_is_not_finite_stays_visible(backend):
    tx = adamfn.with_backend(adamfn.adamw(1e-3), backend)
    for value in (np.inf, -np.inf, np.nan):
        params, _ = after_a_huge_gradient(tx, (2, 3), value)
        assert np.isnan(params[0, 0])
        assert np.isfinite(params[1:]).all()


@pytest.mark.parametrize("eps", [1e-30, 1e-38, 0.0])
def test_an_element_without_a_gradient_stays_where_eps_vanishes(eps):
    # sqrt(c2) eps, or eps itself, is below the smallest normal number: 0 / 0.
    g, p = np.ones((16, 256), np.float32), jnp.ones((16, 256))
    g[0] = 0
    chains = [MEMBERS[name](learning_rate=0.1, eps=eps) for name in MEMBERS if name != "adamw"]
    chains += [adamfn.adamw(0.1, eps=eps, weight_decay=0.0, moments=m) for m in ("8bit", "4bit")]
    chains.append(adamfn.chain(adamfn.scale_by_moments(eps=eps), adamfn.clip_updates(eps=eps)))

    def moved(g, p):
        updates = [tx.update(g, tx.init(p), p)[0] for tx in chains]
        return updates + [adamfn.step(tx, g, tx.init(p), p)[0] - p for tx in chains]

    for u in jax.jit(moved)(g, p):
        np.testing.assert_array_equal(u[0], 0)
        assert np.all(np.isfinite(u) & (u != 0), where=g != 0)


# The derivative of an update at a zero gradient was NaN for want of eps_root (jax pull 3091, optax
# issue 882, facebookresearch/higher issue 125).
SLOPED = MEMBERS | {
    "clipped": lambda **own: adamfn.chain(adamfn.clip_by_global_norm(1e3), adamfn.adam(**own)),
    "clipped far": lambda **own: adamfn.chain(adamfn.clip_by_global_norm(0.1), adamfn.adam(**own)),
    "clip_updates": lambda learning_rate, eps: adamfn.chain(
        adamfn.scale_by_moments(eps=eps),
        adamfn.bias_correct(),
        adamfn.clip_updates(eps=eps),
        adamfn.scale_by_lr(learning_rate),
    ),
}


@pytest.mark.parametrize("name", SLOPED)
def test_hypergradients_at_a_zero_gradient(name):
    with jax.enable_x64(True):
        tx = SLOPED[name](learning_rate=1.0, eps=1e-2)
        params = jnp.ones(3)

        def moved(g):
            def step(carry, _):
                return tx.update(g, carry[1], params), None

            first = tx.update(jnp.zeros(3), tx.init(params), params)
            # radam divides from its sixth step on
            (updates, _), _ = jax.lax.scan(step, first, length=6)
            return updates[0]

        # To lazy_adam a row of zeros is none, so one element is not zero.
        at, nearby = np.eye(3)[2], 1e-7 * np.eye(3)[0]
        points = np.stack([at, at + nearby, at - nearby, np.zeros(3)])
        values, slopes = jax.jit(jax.vmap(jax.value_and_grad(moved)))(points)
        slope, by_differences = slopes[0], (values[1] - values[2]) / 2e-7
        assert np.all(np.isfinite(slopes))
    np.testing.assert_allclose(slope[0], by_differences, rtol=1e-5)
    assert slope[0] != 0
    np.testing.assert_array_equal(slope[1:], 0)


def test_hypergradients_of_an_angle_at_a_zero_gradient():
    # It jumps there, from -a arctan(1 / b) to the opposite: no slope is right, but NaN is wrong.
    for tx in (adamfn.scale_by_atan2_moments(), adamfn.scale_by_atan2_moments(b=0.0)):
        for x64 in (False, True):
            with jax.enable_x64(x64):
                slope = jax.jit(jax.jacobian(lambda g, tx=tx: tx.update(g, tx.init(g))[0]))
                np.testing.assert_array_equal(slope(jnp.zeros(2)), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_hypergradients_through_a_step_that_is_skipped(bad):
    inner = adamfn.chain(
        adamfn.clip_by_global_norm(1.0),
        adamfn.scale_by_moments(),
        adamfn.bias_correct(),
        adamfn.clip_updates(),
        adamfn.scale_by_lr(0.1),
    )
    tx = adamfn.chain(adamfn.skip_outliers(["grad_norm", "loss"]), inner)
    params = {"w": jnp.ones(3)}
    for grads in ({"w": jnp.zeros(3)}, {"w": jnp.ones(3)}):
        _, state = tx.update(grads, tx.init(params), params, loss=1.0)

        def moved(grads, moments, params, loss, state=state):
            state = state[0], (state[1][0], state[1][1]._replace(**moments), *state[1][2:])
            params, after = adamfn.step(tx, grads, state, params, loss=loss)
            return params, {name: getattr(after[1][1], name) for name in moments}

        given = {"w": jnp.array([bad, 1.0, 0.0])}, {"mu": state[1][1].mu, "nu": state[1][1].nu}
        results, pull = jax.vjp(jax.jit(moved), *given, params, 1.0)
        of_grads, of_moments, of_params, of_loss = pull(results)
        # Nothing moves: the gradients and the loss move nothing, all else moves as it is moved.
        np.testing.assert_array_equal(of_grads["w"], 0)
        assert of_loss == 0
        chex.assert_trees_all_equal((of_params, of_moments), results)


@pytest.mark.parametrize("name", sorted(MEMBERS.keys() - {"adamax"}))
def test_eps_root_is_in_units_of_the_corrected_second_moment(name):
    # With a constant gradient the corrected v is g^2 from the first step on.
    g, eps_root = 0.5, 0.11
    tx = MEMBERS[name](learning_rate=1.0, eps=0.0, eps_root=eps_root)
    plain = MEMBERS[name](learning_rate=1.0, eps=0.0)
    params = jnp.zeros(1)
    state, plain_state = tx.init(params), plain.init(params)
    for step in range(8):
        updates, state = tx.update(jnp.array([g]), state, params)
        without, plain_state = plain.update(jnp.array([g]), plain_state, params)
        if name != "radam" or step >= 5:
            np.testing.assert_allclose(
                updates / without, g / np.sqrt(g * g + eps_root), rtol=1e-6, err_msg=str(step)
            )


# A decay after the rate made weights grow, without a word. That the decay depend on the schedule
# alone is asked for in apex issue 1849, tensorflow/addons issues 844 and 2282, schedule_free 47.


def test_a_decay_after_the_rate_is_refused():
    for tx in (adamfn.adam(), adamfn.scale_by_lr(0.1), adamfn.chain(adamfn.chain(adamfn.adam()))):
        with pytest.raises(ValueError, match=r"stands after scale_by_lr, .* makes parameters grow"):
            adamfn.chain(tx, adamfn.add_decayed_weights(0.1))
    with pytest.raises(ValueError, match=r"scale_by_lr stands after .*independent=True"):
        adamfn.chain(adamfn.add_decayed_weights(0.1, independent=True), adamfn.scale_by_lr(0.1))
    with pytest.raises(ValueError, match="both independent and cautious"):
        adamfn.add_decayed_weights(0.1, independent=True, cautious=True)


def test_a_decay_independent_of_the_rate():
    # Loshchilov and Hutter 2019, algorithm 2, line 12: theta - eta (alpha m / root + lambda theta).
    def schedule(count):
        return 0.5 ** (count + 1.0)

    decay = 0.25
    tx = adamfn.chain(
        adamfn.adam(lambda count: 0.125 * schedule(count)),
        adamfn.add_decayed_weights(lambda count: decay * schedule(count), independent=True),
    )
    params = {"w": jnp.array([4.0, -2.0])}
    by_step, by_update = params, params
    state = other = tx.init(params)
    expected = np.array([4.0, -2.0])
    g = jnp.array([3.0, -1.0])
    for count in range(4):
        # A constant gradient moves every weight by the rate, against its sign.
        expected = expected - schedule(count) * (0.125 * np.sign(g) + decay * expected)
        by_step, state = adamfn.step(tx, {"w": g}, state, by_step)
        updates, other = tx.update({"w": g}, other, by_update)
        by_update = adamfn.apply_updates(by_update, updates)
    np.testing.assert_allclose(by_step["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(by_update["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamax", "amsgrad", "nadam"])
def test_huge_gradients_of_unlike_signs_leave_an_element_alive(name):
    tx, largest = member(name), np.finfo(np.float32).max
    params = jnp.ones(2)
    state = tx.init(params)
    for g in (largest, -largest, 1.0, 1.0):
        updates, state = tx.update(jnp.array([g, 1.0]), state, params)
        assert np.all(np.isfinite(updates)), g
