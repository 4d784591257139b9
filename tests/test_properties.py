# SPDX-License-Identifier: Apache-2.0
"""Properties that hold for any tree, shape and dtype."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import adamfn

few = settings(derandomize=True, deadline=None, max_examples=40, database=None)
SHAPES = [(), (0,), (3,), (2, 3), (0, 2), (1, 1, 4)]
DTYPES = ["float32", "bfloat16", "float16", "complex64"]
RATE = 0.5  # so large that the updates of float16 stay clear of its subnormal numbers


@st.composite
def leaves(draw, dtypes=DTYPES):
    """Two gradients of one leaf, of one scale, in NumPy: no shape is compiled for but by adamfn."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.standard_normal((2, *shape)) * 2.0 ** draw(st.integers(-4, 4))
    if dtype == "complex64":
        values = values * np.exp(1j * rng.standard_normal(values.shape))
    return np.asarray(values).astype(jnp.dtype(dtype))


def trees(leaf):
    """Nests of dicts, lists, tuples and None."""
    names = st.sampled_from(["a", "b", "w", "bias"])
    return st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.dictionaries(names, inner, max_size=3)
            | st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
        ),
        max_leaves=8,
    )


def two_steps(tx, grads, wrap=lambda f: f):
    """The updates of both steps, one tree with the step as the leaves' first axis, and states."""
    first, second = (jax.tree.map(lambda g, i=i: g[i], grads) for i in range(2))
    params = jax.tree.map(np.zeros_like, first)
    states = [tx.init(params)]
    found = []
    for g in (first, second):
        updates, state = wrap(tx.update)(g, states[-1], params)
        states.append(state)
        found.append(updates)
    return jax.tree.map(lambda *u: np.stack(u), *found), states


def assert_close(found, expected, dtype):
    """To the roundings of three stages in the leaf's dtype, half a unit each, and float32's own."""
    tolerance = 1.5 * float(jnp.finfo(dtype).eps) + 4 * np.finfo(np.float32).eps
    wide = np.complex128 if np.iscomplexobj(found) else np.float64
    found, expected = (np.asarray(x).astype(wide) for x in (found, expected))
    assert np.all(np.abs(found - expected) <= tolerance * np.max(np.abs(expected), initial=0))


@settings(few, max_examples=15)
@given(trees(leaves()))
def test_structure_shapes_and_dtypes_are_kept(grads):
    tx = adamfn.adamw(RATE)
    updates, states = two_steps(tx, grads)
    chex.assert_trees_all_equal_structs(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    moments = states[-1][0]
    chex.assert_trees_all_equal_structs(moments.mu, moments.nu, grads)
    assert all(mu.dtype in ("float32", "complex64") for mu in jax.tree.leaves(moments.mu))
    assert all(nu.dtype == "float32" for nu in jax.tree.leaves(moments.nu))
    params = jax.tree.map(lambda g: np.ones_like(g[0]), grads)
    moved = adamfn.apply_updates(params, jax.tree.map(lambda u: u[0], updates))
    chex.assert_trees_all_equal_shapes_and_dtypes(moved, params)
    chex.assert_trees_all_equal_structs(moved, params)


@few
@given(trees(leaves()), st.sampled_from([0, 0.5, 0.9]), st.booleans())
def test_every_leaf_follows_the_reference(grads, b1, nesterov):
    tx = adamfn.adam(RATE, b1, 0.99, 1e-3, nesterov=nesterov)
    updates, _ = two_steps(tx, grads)
    for g, u in zip(jax.tree.leaves(grads), jax.tree.leaves(updates), strict=True):
        wide = np.asarray(g, np.complex64 if np.iscomplexobj(g) else np.float32)
        expected = reference.updates(wide, RATE, b1, 0.99, 1e-3, nesterov=nesterov)
        for step in range(2):
            assert_close(u[step], expected[step], g.dtype)


@settings(few, max_examples=12)  # each compiles twice
@given(st.lists(leaves(), max_size=12).flatmap(lambda x: st.tuples(st.just(x), st.permutations(x))))
def test_the_order_of_the_leaves_does_not_matter(both):
    straight, shuffled = both
    order = [next(i for i, x in enumerate(straight) if x is leaf) for leaf in shuffled]
    tx = adamfn.adam(RATE)
    a, _ = two_steps(tx, straight)
    b, _ = two_steps(tx, shuffled)
    chex.assert_trees_all_equal([a[i] for i in order], b)


@settings(few, max_examples=12)
@given(trees(leaves()))
def test_jit_equals_eager(grads):
    # To a rounding: XLA fuses the stages, and may then round less between them.
    tx = adamfn.adamw(RATE, nesterov=True)
    eager, _ = two_steps(tx, grads)
    jitted, _ = two_steps(tx, grads, jax.jit)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager, jitted)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        assert_close(b, a, a.dtype)


@few
@given(trees(leaves(["float32", "complex64"])), st.integers(-30, 30))
def test_without_eps_the_scale_of_the_gradients_does_not_matter(grads, power):
    # A power of two rounds nothing, so the updates are the same to the last bit.
    tx = adamfn.adam(RATE, eps=0)
    scaled = jax.tree.map(lambda g: g * g.dtype.type(2.0**power), grads)
    chex.assert_trees_all_equal(two_steps(tx, grads)[0], two_steps(tx, scaled)[0])


@few
@given(trees(leaves(["float32", "bfloat16", "complex64"])), st.integers(-20, 20))
def test_updates_are_proportional_to_the_rate(grads, power):
    # A power of two again; float16 has not the range for it.
    updates, _ = two_steps(adamfn.adam(RATE), grads)
    scaled, _ = two_steps(adamfn.adam(RATE * 2.0**power), grads)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda u: u * u.dtype.type(2.0**power), updates), scaled
    )
