# SPDX-License-Identifier: Apache-2.0
"""add_decayed_weights: the decay's value, and which parameters decay."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamfn

LAST = 2**31 - 1
PARAMS = {"dense": {"w": jnp.array([2.0, 4.0]), "b": jnp.array([8.0])}, "norm": jnp.array(16.0)}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def decayed(mask=None, weight_decay=0.5, params=PARAMS):
    """For each leaf, in the order w, b, norm, whether it decayed; by the right amount if so."""
    updates = jax.tree.map(jnp.zeros_like, params)
    tx = adamfn.add_decayed_weights(weight_decay, mask)
    found, _ = tx.update(updates, tx.init(params), params)
    yes = []
    for u, p in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert np.all(u == 0) or np.all(u == weight_decay * p)
        yes.append(bool(np.any(u != 0)))
    b, w, norm = yes
    return w, b, norm


@pytest.mark.parametrize("decay", [0.5, np.float32(0.5), jnp.float32(0.5), lambda c: 0.5])
def test_a_multiple_of_the_parameters_is_added(decay):
    tx = adamfn.add_decayed_weights(decay)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda p: 1 + 0.5 * p, PARAMS))
    assert state.count == 1


def test_integers_and_zero():
    tx = adamfn.add_decayed_weights(1)
    np.testing.assert_array_equal(tx.update(jnp.ones(1), tx.init(0.0), jnp.ones(1))[0], [2.0])
    tx = adamfn.add_decayed_weights()
    np.testing.assert_array_equal(tx.update(jnp.ones(1), tx.init(0.0), jnp.ones(1))[0], [1.0])


def test_a_cautious_decay_takes_updates_of_zero_and_none_against_the_parameter():
    tx, params = adamfn.add_decayed_weights(0.5, cautious=True), jnp.array([2.0, 2.0, 2.0, -2.0])
    updates, _ = tx.update(jnp.array([1.0, 0.0, -1.0, -1.0]), tx.init(params), params)
    np.testing.assert_array_equal(updates, [2.0, 1.0, -1.0, -2.0])


def test_a_traced_decay():
    @jax.jit
    def update(decay):
        tx = adamfn.add_decayed_weights(decay)
        return tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))[0]

    np.testing.assert_array_equal(update(0.25), [0.25])


def test_a_schedule():
    tx = adamfn.add_decayed_weights(optax.linear_schedule(1.0, 0.0, 4))
    state = tx.init(jnp.ones(()))
    seen = []
    for _ in range(6):
        u, state = tx.update(jnp.zeros(()), state, jnp.ones(()))
        seen.append(float(u))
    assert seen == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, (True, True, True)),
        ({"dense": {"w": True, "b": False}, "norm": False}, (True, False, False)),
        ({"dense": {"w": np.True_, "b": np.False_}, "norm": np.True_}, (True, False, True)),
        ({"dense": True, "norm": False}, (True, True, False)),
        ({"dense": False, "norm": True}, (False, False, True)),
        (True, (True, True, True)),
        (False, (False, False, False)),
        (lambda params: jax.tree.map(lambda p: p.ndim > 0, params), (True, True, False)),
        (lambda params: {"dense": True, "norm": False}, (True, True, False)),
    ],
    ids=["none", "tree", "numpy", "prefix", "prefix2", "true", "false", "function", "to_prefix"],
)
def test_masks(mask, expected):
    assert decayed(mask) == expected


def test_masks_under_jit():
    tx = adamfn.adamw(1.0, weight_decay=0.5, mask=lambda p: {"dense": True, "norm": False})
    updates, _ = jax.jit(tx.update)(ZEROS, tx.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates["dense"], jax.tree.map(lambda p: -0.5 * p, PARAMS["dense"]))
    assert updates["norm"] == 0


def test_a_masked_leaf_passes_unchanged():
    tx = adamfn.add_decayed_weights(0.5, {"a": False, "b": True})
    updates = {"a": jnp.array([jnp.inf, 1.0]), "b": jnp.ones(1)}
    params = {"a": jnp.array([jnp.nan, jnp.inf]), "b": jnp.ones(1)}
    found, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(found["a"], updates["a"])
    np.testing.assert_array_equal(found["b"], [1.5])


@jax.tree_util.register_pytree_node_class
class CallableModule:
    """A module as Equinox makes them: a pytree that can be called."""

    def __init__(self, w, b):
        self.w, self.b = w, b

    def __call__(self, x):
        raise AssertionError("a mask that is a pytree is not called")

    def tree_flatten(self):
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_a_mask_that_is_a_module_with_a_call():
    # optax issue 1007
    params = CallableModule(jnp.ones(1), jnp.ones(1))
    tx = adamfn.add_decayed_weights(0.5, CallableModule(True, False))
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates.w, [1.5])
    np.testing.assert_array_equal(updates.b, [1.0])


def test_none_leaves_and_empty_subtrees():
    params = {"a": jnp.ones(1), "none": None, "empty": {}}
    masks = [
        None,
        True,
        {"a": True, "none": None, "empty": {}},
        {"a": True, "none": True, "empty": False},
    ]
    for mask in masks:
        tx = adamfn.add_decayed_weights(0.5, mask)
        updates, _ = tx.update(params, tx.init(params), params)
        assert updates == {"a": jnp.array([1.5]), "none": None, "empty": {}}


def test_where_it_stands_makes_it_decoupled_or_not():
    # Decoupled, the decay escapes the division by the root; as an L2 penalty it does not.
    params, g = jnp.array([100.0]), jnp.array([0.0])
    decoupled = adamfn.adamw(0.1, weight_decay=0.5)
    penalty = adamfn.chain(adamfn.add_decayed_weights(0.5), adamfn.adam(0.1))
    u, _ = decoupled.update(g, decoupled.init(params), params)
    np.testing.assert_allclose(u, [-0.1 * 0.5 * 100], rtol=1e-6)
    u, _ = penalty.update(g, penalty.init(params), params)
    np.testing.assert_allclose(u, [-0.1], rtol=1e-6)


def test_adamw_decays_by_a_hundredth_unless_told():
    tx = adamfn.adamw(1.0)
    u, _ = tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))
    np.testing.assert_allclose(u, [-0.01], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "complex64"])
def test_it_is_computed_wide_and_keeps_the_dtype(dtype):
    params, g = jnp.array([3.0], dtype), jnp.array([1.0], dtype)
    tx = adamfn.add_decayed_weights(1 / 3)
    u, _ = tx.update(g, tx.init(params), params)
    assert u.dtype == dtype
    np.testing.assert_array_equal(u, jnp.array([2.0], dtype))


def test_wide_parameters_of_narrow_gradients():
    params, g = jnp.array([1.0]), jnp.array([1.0], jnp.bfloat16)
    tx = adamfn.adamw(0.1)
    u, _ = tx.update(g, tx.init(params), params)
    assert u.dtype == jnp.bfloat16


@pytest.mark.parametrize("count", [0, LAST - 1, LAST])
def test_the_count_stops_at_its_last(count):
    tx = adamfn.add_decayed_weights(0.5)
    state = tx.init(jnp.ones(1))
    assert state._fields == ("count",)
    _, state = tx.update(jnp.ones(1), state._replace(count=jnp.int32(count)), jnp.ones(1))
    assert state.count == min(count + 1, LAST)
    assert state.count.dtype == jnp.int32
