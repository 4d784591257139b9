# SPDX-License-Identifier: Apache-2.0
"""Stages with a statistic of each leaf: cautious_updates, clip_updates, and a user's own."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import adamfn

FORMATS = ["float32", "bfloat16", "8bit", "4bit", "factored", "blockmean"]
SHAPES = {"kernel": (64, 256), "layers": (3, 8, 256), "bias": (5,), "scalar": ()}
STACKED = adamfn.masks.named("layers")
B1, B2, STEPS = 0.9, 0.9, 6


def gradients(steps=STEPS):
    """They grow, and some elements turn around, so that both stages have something to do."""
    rng = np.random.default_rng(0)
    layers = np.arange(1.0, 4.0).reshape(3, 1, 1)
    return [
        {
            name: jnp.float32(2.0**k * rng.normal(size=shape) * (layers if name == "layers" else 1))
            for name, shape in SHAPES.items()
        }
        for k in range(steps)
    ]


PARAMS = {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def mean(name, x, stacked):
    by_layer = stacked and name == "layers"
    return x.mean(axis=tuple(range(1, x.ndim)), keepdims=True) if by_layer else x.mean()


def cautious(name, u, g, nu, stacked, floor=1e-3):
    agrees = u * g > 0
    return u * agrees / np.maximum(mean(name, agrees, stacked), floor)


def clipped(name, u, g, nu, stacked, eps=1e-8):
    root = np.sqrt(mean(name, g**2 / np.maximum(nu, eps**2), stacked))
    return u / np.maximum(1, root)


STAGES = {
    "cautious": (adamfn.cautious_updates, cautious),
    "clipped": (lambda **more: adamfn.clip_updates(b2=B2, **more), clipped),
}


def recipe(name, *first, moments="float32", stacked=None):
    return adamfn.chain(
        *first,
        adamfn.scale_by_moments(B1, B2, moments=moments),
        adamfn.bias_correct(B1, B2),
        STAGES[name][0](stacked=stacked),
        adamfn.scale_by_lr(0.1),
    )


def expected_updates(stage, grads, stacked, bound=np.inf):
    """In NumPy's float64, from the formulas; gradients are clipped to a global norm before."""
    m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for t, given in enumerate(grads, start=1):
        wide = {name: np.asarray(g, np.float64) for name, g in given.items()}
        norm = np.sqrt(sum(np.sum(g**2) for g in wide.values()))
        updates = {}
        for name, g in wide.items():
            g = g * min(1, bound / norm)
            m[name] = B1 * m[name] + (1 - B1) * g
            v[name] = B2 * v[name] + (1 - B2) * g**2
            nu = v[name] / (1 - B2**t)
            u = m[name] / (1 - B1**t) / (np.sqrt(nu) + 1e-8)
            updates[name] = -0.1 * stage(name, u, g, nu, stacked)
        yield updates


def assert_close(found, expected, tolerance=1e-6):
    for name, u in expected.items():
        assert reference.worst_error(found[name][None], u[None]) < tolerance, name


@pytest.mark.parametrize("stacked", [None, STACKED], ids=["leaves", "layers"])
@pytest.mark.parametrize("name", STAGES)
def test_updates_are_the_formulas(name, stacked):
    tx = recipe(name, stacked=stacked)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for g, expected in zip(
        gradients(), expected_updates(STAGES[name][1], gradients(), stacked), strict=True
    ):
        found, state = update(g, state)
        assert_close(found, expected)


def test_clip_updates_bounds_the_corrected_squares_from_below():
    parts, g = (adamfn.scale_by_moments(), adamfn.bias_correct()), np.ones(1, np.float32)
    found = []
    for tx in (adamfn.chain(*parts), adamfn.chain(*parts, adamfn.clip_updates(eps=0.9))):
        _, state = tx.update(1e-6 * g, tx.init(g))
        found.append(tx.update(g, state)[0])  # the corrected nu is 0.5, less than 0.9^2
    np.testing.assert_allclose(found[1], 0.9 * found[0], rtol=1e-5)


def test_clip_updates_compares_the_gradients_that_the_moments_were_given():
    # The norm grows 2^k-fold before it is clipped, and not at all after.
    tx = recipe("clipped", adamfn.clip_by_global_norm(0.5))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for g, expected in zip(
        gradients(), expected_updates(clipped, gradients(), None, bound=0.5), strict=True
    ):
        found, state = update(g, state, PARAMS)
        assert_close(found, expected, 5e-6)  # terms of the scalar's average cancel


@cache
def ratio_and_nu(moments):
    """Transformations that return the corrected ratio, and nu as it is stored."""
    first = adamfn.scale_by_moments(B1, B2, moments=moments)
    nu = adamfn.from_stage(adamfn.Stage("nu", of_nu, ("nu",), **WHOLE))
    return adamfn.chain(first, adamfn.bias_correct(B1, B2)), adamfn.chain(first, nu)


@pytest.mark.parametrize(
    ("name", "moments"), [*(("clipped", moments) for moments in FORMATS), ("cautious", "8bit")]
)
def test_every_format(name, moments):
    """The same formula of the updates without the stage, and of nu as it is stored."""
    tx = recipe(name, moments=moments, stacked=STACKED)
    plain, second = ratio_and_nu(moments)
    states = [jax.jit(each.init)(PARAMS) for each in (tx, plain, second)]
    for t, g in enumerate(gradients(3), start=1):
        pairs = zip((tx, plain, second), states, strict=True)
        results = [jax.jit(each.update)(g, state) for each, state in pairs]
        states = [state for _, state in results]
        found, u, nu = (
            {name: np.asarray(x, np.float64) for name, x in tree.items()} for tree, _ in results
        )
        expected = {
            k: -0.1 * STAGES[name][1](k, u[k], np.float64(g[k]), nu[k] / (1 - B2**t), STACKED)
            for k in SHAPES
        }
        assert_close(found, expected, 1e-5)
    # Native code runs the moments before a statistic, and XLA those of an update: a float32 unit.
    chex.assert_trees_all_close(states[0][0], states[1][0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("name", STAGES)
def test_step_is_update_and_a_sum(name, moments):
    tx = recipe(name, moments=moments, stacked=STACKED)
    params, state = PARAMS, tx.init(PARAMS)
    step = jax.jit(lambda g, s, p: adamfn.step(tx, g, s, p))
    for g in gradients(3):
        updates, after = jax.jit(tx.update)(g, state, params)
        expected = adamfn.apply_updates(params, updates)
        params, state = step(g, state, params)
        chex.assert_trees_all_close(params, expected, rtol=1e-6)
        chex.assert_trees_all_close(state, after, rtol=1e-6)


@pytest.mark.optimized  # memory of a compiled program
@pytest.mark.parametrize("name", STAGES)
def test_large_leaves_take_turns(name):
    """On CPU, between segments, the updates of one large leaf are in memory, and not of all."""
    params = [jax.ShapeDtypeStruct((512, 512), jnp.float32)] * 8
    tx = recipe(name)
    step = jax.jit(lambda p, s, g: adamfn.step(tx, g, s, p), donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    # Those, and up to two arrays more for their statistic.
    assert compiled.memory_analysis().temp_size_in_bytes < 3.1 * 4 * 512 * 512


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_is_skipped(name):
    tx = recipe(name, adamfn.skip_outliers(["grad_norm"]), stacked=STACKED)
    g = gradients(1)[0]
    step = jax.jit(lambda g, s, p: adamfn.step(tx, g, s, p))
    params, state = step(g, tx.init(PARAMS), PARAMS)
    bad = {**g, "bias": g["bias"] * np.float32(np.nan)}
    after, held = step(bad, state, params)
    chex.assert_trees_all_equal((after, held[1:]), (params, state[1:]))
    assert held[0].skipped == 1


# A stage of one's own


WHOLE = {"elementwise": False}


def of_nu(u, nu):
    return nu


def by_mean_size(u, rate):
    return u * rate / jnp.mean(jnp.abs(u))


def by_size(**more):
    half = {"scalars": lambda count, state, extra: ((0.5,), {})}
    return adamfn.from_stage(adamfn.Stage("by_mean_size", by_mean_size, **WHOLE, **half, **more))


@pytest.mark.parametrize("backend", ["auto", "xla", "pallas"])
def test_a_stage_of_ones_own(backend):
    tx = adamfn.with_backend(by_size(), backend)
    u = jnp.array([[1.0, -2.0], [4.0, -5.0]])
    for update in (tx.update, jax.jit(tx.update)):
        updates, state = update(u, tx.init(u))
        np.testing.assert_allclose(updates, u / 6, rtol=1e-6)
        assert state.count == 1
    moved, _ = adamfn.step(tx, u, tx.init(u), u)
    np.testing.assert_allclose(moved, u + u / 6, rtol=1e-6)


@pytest.mark.parametrize(("place", "factor"), [(0, 0.125), (1, 0.25), (2, 0.5)])
def test_it_stands_anywhere_and_nothing_is_rounded_beside_it(place, factor):
    half = adamfn.Stage("half", jnp.multiply, scalars=lambda *_: ((0.5,), {}))
    parts = [adamfn.from_stage(half)] * 2
    parts.insert(place, by_size())  # factors before it have no effect
    tx, u = adamfn.chain(*parts), jnp.array([1.0, -2.0, 255.0], jnp.bfloat16)
    updates, _ = tx.update(u, tx.init(u))
    assert updates.dtype == jnp.bfloat16
    expected = factor * np.float32(u) / np.float32(258 / 3)
    np.testing.assert_array_equal(updates, jnp.asarray(expected).astype(jnp.bfloat16))


def test_a_mask_leaves_other_leaves_alone():
    params = {"a": jnp.array([1.0, 3.0]), "b": jnp.array([1.0, 3.0])}
    tx = adamfn.chain(by_size(mask={"a": True, "b": False}), adamfn.scale_by_lr(1.0))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], -params["a"] / 4, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], -params["b"])


def test_it_differentiates_and_maps():
    tx = by_size()

    def moved(u):
        return tx.update(u, tx.init(u))[0]

    u = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(jax.vmap(moved)(u), u / 4, rtol=1e-6)
    _, tangent = jax.jvp(moved, (u[0],), (u[0],))
    np.testing.assert_allclose(tangent, 0, atol=1e-6)  # it does not depend on the scale


@pytest.mark.parametrize("make", [by_size, adamfn.cautious_updates, adamfn.clip_updates])
def test_packed_refuses_it(make):
    with pytest.raises(ValueError, match=r"packed: .* statistic"):
        adamfn.packed(adamfn.chain(adamfn.scale_by_moments(), make()))


# Gradients that are None


TRAINED = {"frozen": None, "layers": jnp.float32([[1, -2], [3, 4]]), "w": jnp.float32([1, 2])}
WEIGHTS = {"frozen": jnp.ones(3), "layers": jnp.ones((2, 2)), "w": jnp.ones(2)}
MASKS = {
    "tree": {"frozen": False, "layers": True, "w": False},
    "true where None": {"frozen": True, "layers": True, "w": False},
    "None": {"frozen": None, "layers": True, "w": False},
    "function": STACKED,
    "function of axes": lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("params", [TRAINED, WEIGHTS], ids=["None in params", "params"])
@pytest.mark.parametrize("name", [*STAGES, "decay"])
def test_gradients_that_are_none(name, params, mask):
    def made(mask):
        if name == "decay":
            return adamfn.adamw(0.1, weight_decay=0.5, mask=mask)
        return recipe(name, stacked=mask)

    tx, plain = made(MASKS[mask]), made({"layers": True, "w": False})
    g, p = ({k: tree[k] for k in ("layers", "w")} for tree in (TRAINED, params))
    expected, _ = plain.update(g, plain.init(p), p)
    for state in (tx.init(TRAINED), tx.init({**params, "frozen": None})):
        updates, after = tx.update(TRAINED, state, params)
        chex.assert_trees_all_close(updates, {"frozen": None, **expected}, rtol=1e-6)
        moved, stepped = adamfn.step(tx, TRAINED, state, params)
        chex.assert_trees_all_close(
            moved, {**params, **adamfn.apply_updates(p, expected)}, rtol=1e-6
        )
        chex.assert_trees_all_close(stepped, after, rtol=1e-6)


def test_a_packed_chain_with_gradients_that_are_none():
    tx = adamfn.packed(adamfn.adamw(0.1))
    updates, _ = tx.update(TRAINED, tx.init(TRAINED), WEIGHTS)
    plain = adamfn.adamw(0.1)
    expected, _ = plain.update(TRAINED, plain.init(TRAINED), WEIGHTS)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# Rows without a gradient


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
def test_rows_without_a_gradient_keep_their_codes(moments):
    table = jnp.ones((64, 256))
    tx, plain = adamfn.lazy_adam(0.1, moments=moments), adamfn.adam(0.1, moments=moments)
    g = jnp.asarray(np.random.default_rng(0).normal(size=table.shape), jnp.float32)
    update, every = jax.jit(tx.update), jax.jit(plain.update)
    _, state = update(g, tx.init(table))
    _, moving = every(g, plain.init(table))
    rows = np.arange(64) % 3 == 0
    for k in range(3):
        some = g * rows[:, None] * (k + 1)
        updates, after = update(some, state)
        _, moving = every(some, moving)
        np.testing.assert_array_equal(updates[~rows], 0)
        for old, new in zip(*map(jax.tree.leaves, (state[0], after[0])), strict=True):
            if old.ndim and old.shape[0] == 64:
                np.testing.assert_array_equal(new[~rows], old[~rows])
        assert np.all(np.any(np.asarray(after[0].mu != state[0].mu)[rows], axis=-1))
        state = after
    if moments == "float32":
        np.testing.assert_allclose(state[0].nu[rows], moving[0].nu[rows], rtol=1e-6)


def test_formats_that_share_rows_are_refused():
    tx = adamfn.lazy_adam(moments="factored")
    with pytest.raises(
        ValueError, match="scale_by_lazy_moments: the format of the leaf at t stores"
    ):
        tx.init({"t": jnp.ones((256, 256))})
