# SPDX-License-Identifier: Apache-2.0
"""clip_by_global_norm: as optax's, and its norm readable."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn


def gradients(scale=1.0):
    rng = np.random.default_rng(0)
    shapes = {"w": (7, 5), "b": (5,), "s": ()}
    return {name: jnp.float32(scale * rng.normal(size=shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("bound", [0.5, 1e3, lambda count: 0.5 + count])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-15, 1e15])
def test_clips_as_optax(bound, scale):
    grads = gradients(scale)
    tx = adamfn.clip_by_global_norm(bound)
    found, state = tx.update(grads, tx.init(grads))
    expected, _ = optax.clip_by_global_norm(bound(0) if callable(bound) else bound).update(
        grads, optax.EmptyState()
    )
    chex.assert_trees_all_close(found, expected, rtol=3e-7, atol=0)
    np.testing.assert_allclose(state.grad_norm, optax.tree.norm(grads), rtol=3e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "float64", "complex128"])
def test_the_norm_is_right_where_squares_are_not(dtype):
    # Squares of 1e20 overflow, those of 1e-23 vanish; in double precision, of 1e200 and 1e-200.
    scales = [1e-30, 1e-23, 1e-19, 1e-10, 1.0, 1e15, 1e20, 1e25, 1e34]
    scales += [1e-300, 1e-200, 1e200, 1e300] if dtype in ("float64", "complex128") else []
    rng = np.random.default_rng(1)
    wide = np.complex128 if dtype.startswith("complex") else np.float64
    with jax.enable_x64(dtype in ("float64", "complex128")):
        tx = adamfn.chain(adamfn.clip_by_global_norm(1e-2), adamfn.scale_by_lr(1.0))

        def norm_of(g):
            return tx.update(g, tx.init(g))[1][0].grad_norm

        @jax.jit
        def both(g):
            moved, _ = adamfn.step(tx, g, tx.init(g), jax.tree.map(jnp.zeros_like, g))
            return norm_of(g), tx.update(g, tx.init(g))[0], moved, jax.grad(norm_of)(g)

        for scale in scales:
            values = [rng.normal(size=shape) * scale for shape in ((40, 30), (7,), ())]
            grads = [
                jnp.asarray(x * (1 + 1j) if wide is np.complex128 else x, dtype) for x in values
            ]
            exact = [np.asarray(g).astype(wide) for g in grads]
            norm = scale * np.sqrt(sum(np.sum(np.abs(x / scale) ** 2) for x in exact))
            found, *trees = both(grads)
            tolerance = 1e-2 if dtype == "bfloat16" else 1e-6  # of updates: a rounding of bfloat16
            np.testing.assert_allclose(found, norm, rtol=1e-6)
            clipped = [-x * min(1, 1e-2 / norm) for x in exact]
            for tree, expected in zip(
                trees, (clipped, clipped, [x.conj() / norm for x in exact]), strict=True
            ):
                for x, like in zip(tree, expected, strict=True):
                    np.testing.assert_allclose(np.asarray(x).astype(wide), like, rtol=tolerance)


@pytest.mark.parametrize("make", [lambda tx: tx, adamfn.packed], ids=["plain", "packed"])
def test_a_chain_that_begins_with_it(make):
    grads, params = gradients(), gradients(0.1)
    ours = make(adamfn.chain(adamfn.clip_by_global_norm(0.5), adamfn.adamw(0.1)))
    theirs = adamfn.chain(optax.clip_by_global_norm(0.5), adamfn.adamw(0.1))
    states, moved = [ours.init(params), theirs.init(params)], [params, params]
    for k in range(3):
        scaled = jax.tree.map(lambda g, k=k: (-2.0) ** k * g, grads)
        for i, tx in enumerate((ours, theirs)):
            moved[i], states[i] = adamfn.step(tx, scaled, states[i], moved[i])
    chex.assert_trees_all_close(*moved, atol=5e-7)  # a rounding of parameters up to 1, and steps


def test_a_norm_that_is_given_wins():
    grads = {"w": jnp.array([3.0, 4.0])}
    tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.scale_by_lr(1.0))
    params, state = adamfn.step(tx, grads, tx.init(grads), grads, grad_norm=10.0)
    np.testing.assert_allclose(params["w"], [2.7, 3.6], rtol=1e-6)
    assert state[0].grad_norm == 10


def test_narrow_and_complex_gradients():
    grads = {"a": jnp.full(4096, 2.0, jnp.bfloat16), "c": jnp.array([3 + 4j])}
    tx = adamfn.clip_by_global_norm(1.0)
    _, state = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(state.grad_norm, np.sqrt(4 * 4096 + 25), rtol=1e-6)


def test_what_is_not_finite_stays_visible():
    grads = {"w": jnp.array([jnp.nan, 1.0])}
    tx = adamfn.clip_by_global_norm(1.0)
    updates, _ = tx.update(grads, tx.init(grads))
    assert jnp.all(jnp.isnan(updates["w"]))


@pytest.mark.parametrize("bound", [0.0, jnp.float32(0), lambda count: 0.0 * count])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_bound_of_zero(bound, scale):
    grads = gradients(scale)
    tx = adamfn.chain(adamfn.clip_by_global_norm(bound), adamfn.adam(0.1))
    updates, state = jax.jit(tx.update)(grads, tx.init(grads))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, grads))
    chex.assert_tree_all_finite(state)


def test_no_leaves():
    tx = adamfn.chain(adamfn.clip_by_global_norm(1.0), adamfn.adam())
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state[0].grad_norm == 0
