"""map_leaves: every result at its own leaf, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.trees import check_inexact, map_leaves, real_dtype, wide_dtype

SHAPES = [(3,), (2, 2), ()]
NAMES = {"caller": "test", "way_out": ""}


def interleaved(count):
    """Leaves of three shapes in turn, each with values of its own."""
    return {
        f"{index:04}": jnp.full(SHAPES[index % 3], 1.0 + index, jnp.float32)
        for index in range(count)
    }


def _sum_and_difference(a, b, factor):
    return a + factor * b, a - factor * b


# 20: a few leaves a shape. 400: batches of several leaves. 401 and 560: and odd ones left over.
@pytest.mark.parametrize("count", [1, 20, 400, 401, 560])
def test_every_result_lands_at_its_own_leaf(count):
    a = interleaved(count)
    b = {name: 1000 * leaf for name, leaf in a.items()}
    total, difference = map_leaves(
        _sum_and_difference, {"a": a, "b": b}, (jnp.float32(2),), **NAMES
    )
    assert list(total) == list(difference) == list(a)
    for name, leaf in a.items():
        np.testing.assert_array_equal(total[name], 2001 * leaf)
        np.testing.assert_array_equal(difference[name], -1999 * leaf)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_adam_over_many_interleaved_leaves_equals_adam_over_each(wrap):
    params = interleaved(140)
    tx = adamfn.adamw(0.1, weight_decay=0.1)
    state = tx.init(params)
    grads = {name: jnp.sin(leaf) for name, leaf in params.items()}
    update = wrap(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
    alone = jax.jit(tx.update)
    for name in list(params)[::9]:
        own = tx.init(params[name])
        for _ in range(2):
            expected, own = alone(grads[name], own, params[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)
        np.testing.assert_allclose(state[0].mu[name], own[0].mu, rtol=1e-6)
        np.testing.assert_allclose(state[0].nu[name], own[0].nu, rtol=1e-6)


def test_results_take_the_dtypes_of_their_leaves():
    tree = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float16)}
    moments = jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    first, second = map_leaves(_sum_and_difference, {"a": tree, "b": moments}, (1 / 3,), **NAMES)
    assert first["a"].dtype == jnp.bfloat16
    assert first["b"].dtype == jnp.float16
    assert second["a"].dtype == second["b"].dtype == jnp.float32


def test_the_formula_sees_float32_at_least():
    # 1 + 2^-9 is no bfloat16; rounding the factor first would give 1.
    factor = 1 + 2**-9
    (product,) = map_leaves(_times, {"a": jnp.array([256.0], jnp.bfloat16)}, (factor,), **NAMES)
    np.testing.assert_array_equal(product, jnp.array([256.5]).astype(jnp.bfloat16))
    (difference,) = map_leaves(
        _times_minus, {"a": jnp.array([256.0], jnp.bfloat16)}, (factor,), **NAMES
    )
    assert difference[0] == 0.5


def _times(a, factor):
    return (a * factor,)


def _times_minus(a, factor):
    return (a * factor - a,)


@pytest.mark.parametrize("tree", [{}, (), None, [], {"a": None, "b": {"c": ()}}], ids=repr)
def test_trees_without_leaves(tree):
    results = map_leaves(_sum_and_difference, {"a": tree, "b": tree}, (1.0,), **NAMES)
    assert results == (tree, tree)


def test_one_trace_serves_all_leaves_of_one_signature():
    traced = []

    def formula(a):
        traced.append(a.shape)
        return (a,)

    tree = [jnp.zeros((7, shape)) for shape in (3, 5) * 20]
    map_leaves(formula, {"a": tree}, **NAMES)
    assert len(traced) == 2
    map_leaves(formula, {"a": tree}, **NAMES)
    assert len(traced) == 2


def test_wide_and_real_dtypes():
    assert wide_dtype(jnp.bfloat16) == wide_dtype(jnp.float16) == wide_dtype(jnp.float32)
    assert wide_dtype(jnp.float32) == jnp.float32
    assert wide_dtype(jnp.complex64) == jnp.complex64
    assert wide_dtype(jnp.float64) == jnp.float64
    assert real_dtype(jnp.complex64) == jnp.float32
    assert real_dtype(jnp.complex128) == jnp.float64
    assert real_dtype(jnp.float32) == jnp.float32


def test_floats_of_any_kind_are_leaves():
    check_inexact([1.0, 1j, np.ones(2), np.float16(1), jnp.ones(2, jnp.bfloat16), None, {}], "x")


@pytest.mark.parametrize("leaf", [1, True, "x", len, jnp.arange(2), jax.random.key(0)])
def test_other_things_are_not(leaf):
    with pytest.raises(TypeError, match=r"x: the leaf at \['a'\]\[0\] is"):
        check_inexact({"a": [leaf], "b": 1.0}, "x")
