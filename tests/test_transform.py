# SPDX-License-Identifier: Apache-2.0
"""chain, apply_updates, and what every stage keeps: structure, shapes and dtypes."""

import warnings
from itertools import permutations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

STAGES = {
    "moments": lambda: adamfn.scale_by_moments(),
    "bias": lambda: adamfn.bias_correct(),
    "decay": lambda: adamfn.add_decayed_weights(0.1),
    "lr": lambda: adamfn.scale_by_lr(0.1),
}


def mixed_tree():
    return {
        "f32": jnp.array([1.0, -2.0]),
        "half": [jnp.ones((2, 3), jnp.bfloat16), jnp.ones((), jnp.float16)],
        "complex": (jnp.array([1 + 2j]), None),
        "empty": {},
        "zero_size": jnp.zeros((0, 3)),
    }


def assert_alike(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


ORDERS = [order for order in permutations(STAGES) if order.index("decay") < order.index("lr")][::2]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order_keeps_structure_shapes_and_dtypes(order):
    params = mixed_tree()
    tx = adamfn.chain(*(STAGES[name]() for name in order))
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert_alike(updates, params)
    assert_alike(after, state)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", [*STAGES, "adam", "adamw"])
@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_one_stage_alone(name, wrap):
    tx = {**STAGES, "adam": adamfn.adam, "adamw": adamfn.adamw}[name]()
    params = mixed_tree()
    state = tx.init(params)
    updates, after = wrap(tx.update)(params, state, params)
    assert_alike(updates, params)
    assert_alike(after, state)


@pytest.mark.parametrize("name", [*STAGES, "adam", "adamw"])
def test_double_precision_leaves(name):
    with jax.enable_x64(True):
        tx = {**STAGES, "adam": adamfn.adam, "adamw": adamfn.adamw}[name]()
        params = {"a": jnp.ones(2), "b": jnp.ones(2, jnp.float32), "c": jnp.ones(2) * 1j}
        assert [p.dtype.name for p in params.values()] == ["float64", "float32", "complex128"]
        updates, _ = tx.update(params, tx.init(params), params)
        assert_alike(updates, params)


@pytest.mark.parametrize("tree", [{}, (), None, [], {"a": None, "b": {"c": ()}}], ids=repr)
@pytest.mark.parametrize("name", [*STAGES, "adam", "adamw"])
def test_trees_without_leaves(name, tree):
    tx = {**STAGES, "adam": adamfn.adam, "adamw": adamfn.adamw}[name]()
    updates, after = tx.update(tree, tx.init(tree), tree)
    assert updates == tree
    assert jax.tree.structure(after) == jax.tree.structure(tx.init(tree))
    assert adamfn.apply_updates(tree, updates) == tree


@pytest.mark.parametrize(
    "leaf", [2.0, np.float32(2), np.float64(2), np.array([2.0, 3.0]), np.float16([2]), 2j], ids=repr
)
def test_python_and_numpy_leaves(leaf):
    tx = adamfn.adamw(0.1)
    expected, _ = tx.update(jnp.asarray(leaf), tx.init(jnp.asarray(leaf)), jnp.asarray(leaf))
    params = {"x": leaf}
    state = tx.init(params)
    for update in (tx.update, jax.jit(tx.update)):
        updates, after = update(params, state, params)
        assert_alike(updates, {"x": jnp.asarray(leaf)})
        assert_alike(after, state)
        np.testing.assert_allclose(updates["x"], expected, rtol=1e-6)
    moved = adamfn.apply_updates(params, updates)
    np.testing.assert_allclose(moved["x"], leaf + np.asarray(expected), rtol=1e-3)


def test_adam_is_the_chain_of_its_three_stages():
    adam = adamfn.adam(0.1, 0.8, 0.99, 1e-3, eps_root=1e-4, nesterov=True)
    chain = adamfn.chain(
        adamfn.scale_by_moments(0.8, 0.99, 1e-3, eps_root=1e-4, nesterov=True),
        adamfn.bias_correct(0.8, 0.99),
        adamfn.scale_by_lr(0.1),
    )
    g = jnp.array([1.0, -0.1])
    chex.assert_trees_all_equal(adam.update(g, adam.init(g)), chain.update(g, chain.init(g)))


def test_chain_of_nothing_is_the_identity():
    tx = adamfn.chain()
    tree = {"a": jnp.arange(3), "b": None}  # whatever the leaves are
    assert tx.init(tree) == ()
    updates, state = tx.update(tree, ())
    assert updates is tree
    assert state == ()


def test_chain_of_one():
    one = adamfn.scale_by_lr(0.5)
    tx = adamfn.chain(one)
    g = jnp.array([2.0])
    updates, state = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, [-1.0])
    chex.assert_trees_all_equal(state, (one.update(g, one.init(g))[1],))


def test_chain_goes_from_left_to_right():
    add = adamfn.GradientTransformation(lambda p: (), lambda u, s, p=None, **kw: (u + 1, s))
    double = adamfn.GradientTransformation(lambda p: (), lambda u, s, p=None, **kw: (u * 2, s))
    g = jnp.array(3.0)
    for tx, expected in ((adamfn.chain(add, double), 8), (adamfn.chain(double, add), 7)):
        assert tx.update(g, tx.init(g))[0] == expected


def test_nested_chains():
    stages = [make() for make in STAGES.values()]
    flat = adamfn.chain(*stages)
    nested = adamfn.chain(adamfn.chain(stages[0], adamfn.chain(stages[1])), *stages[2:])
    g = params = {"w": jnp.array([1.0, 2.0])}
    a, b = (tx.update(g, tx.init(params), params) for tx in (flat, nested))
    chex.assert_trees_all_equal(a[0], b[0])
    chex.assert_trees_all_equal(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]))


def test_a_transformation_without_extra_arguments():
    def update(updates, state, params=None):
        return jax.tree.map(lambda u: 3 * u, updates), state + 1

    triple = adamfn.GradientTransformation(lambda params: 0, update)
    tx = adamfn.chain(triple, adamfn.scale_by_lr(0.5), triple)
    g = jnp.array([1.0])
    updates, state = tx.update(g, tx.init(g), learning_rate=0.25, unknown=object())
    np.testing.assert_array_equal(updates, [-2.25])
    assert (state[0], state[2]) == (1, 1)


def test_a_transformation_that_takes_one_extra_argument():
    def update(updates, state, params=None, *, loss):
        return updates * loss, state

    scale = adamfn.GradientTransformation(lambda params: (), update)
    tx = adamfn.chain(adamfn.chain(scale), adamfn.scale_by_lr(1.0))
    updates, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)), loss=3.0, unknown=None)
    np.testing.assert_array_equal(updates, [-6.0])


def test_params_reach_every_part():
    decay = adamfn.add_decayed_weights(1.0, mask=True)
    tx = adamfn.chain(decay, adamfn.chain(decay))
    params = jnp.array([2.0])
    updates, _ = tx.update(jnp.zeros(1), tx.init(params), params)
    np.testing.assert_array_equal(updates, [4.0])


def test_a_transformation_is_a_pair():
    init, update = tx = adamfn.adam()
    assert (init, update) == (tx.init, tx.update)
    assert adamfn.GradientTransformation._fields == ("init", "update")


def test_apply_updates():
    params = {"a": jnp.array([1.0, 2.0]), "b": [jnp.array(3.0), None], "c": ()}
    updates = {"a": jnp.array([0.5, -0.5]), "b": [jnp.array(-3.0), None], "c": ()}
    moved = adamfn.apply_updates(params, updates)
    chex.assert_trees_all_equal(
        moved, {"a": jnp.array([1.5, 1.5]), "b": [jnp.array(0.0), None], "c": ()}
    )


def test_apply_updates_leaves_alone_what_has_no_update():
    params = {"a": jnp.array([1.0]), "n": jnp.arange(2), "f": len, "none": None}
    moved = adamfn.apply_updates(params, {"a": jnp.ones(1), "n": None, "f": None, "none": None})
    np.testing.assert_array_equal(moved["a"], [2.0])
    assert moved["n"] is params["n"]
    assert moved["f"] is len
    assert moved["none"] is None


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_apply_updates_of_float8(dtype):
    """JAX promotes no float8 by itself."""
    one, half = jnp.ones(1, dtype), jnp.full(1, 0.5, dtype)
    for params, updates in ((one, half), (one, jnp.full(1, 0.5)), (jnp.ones(1, "bfloat16"), half)):
        moved = adamfn.apply_updates(params, updates)
        assert moved.dtype == params.dtype
        assert moved.astype(jnp.float32) == 1.5


@pytest.mark.parametrize("recipe", [adamfn.adam, adamfn.adamw, adamfn.lazy_adam])
def test_parameters_that_numpy_made(recipe):
    """In float64, which JAX has only with x64, and of which it warns."""
    params, grads, tx = np.full(3, 2.0), jnp.array([1.0, -1.0, 2.0]), recipe(0.5)
    state = tx.init(params)
    with warnings.catch_warnings(action="error"):
        found, expected = (tx.update(grads, state, own)[0] for own in (params, jnp.asarray(params)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_apply_updates_adds_in_float32_and_keeps_the_dtype_of_the_parameter(dtype):
    params = jnp.array([1.0], dtype)
    moved = adamfn.apply_updates(params, jnp.array([1 / 3]))
    assert moved.dtype == dtype
    assert moved == jnp.float32(4 / 3).astype(dtype)
    # An update of more than half a unit in the last place, wider than what it is added to.
    half = float(jnp.finfo(dtype).eps) / 2
    assert adamfn.apply_updates(params, jnp.array([half * 1.001]))[0] == 1 + 2 * half
    assert adamfn.apply_updates(params, jnp.array([half * 0.999]))[0] == 1
