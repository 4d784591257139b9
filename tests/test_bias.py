# SPDX-License-Identifier: Apache-2.0
"""bias_correct: sqrt(1 - b2^t) / (1 - b1^t) to 3e-7, from the first step on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamfn

COUNTS = [1, 2, 3, 5, 10, 30, 100, 1000, 10**4, 10**6, 2**24 + 1, 2**31 - 1]
LAST = 2**31 - 1


def factor(tx, count):
    state = tx.init(jnp.ones(1))._replace(count=jnp.int32(count - 1))
    return float(tx.update(jnp.ones(1), state)[0][0])


def expected_factor(b1, b2, count):
    c1, c2 = (-np.expm1(count * np.log(b)) if b else 1.0 for b in (b1, b2))
    return np.sqrt(c2) / c1


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "bs", [(0.9, 0.999), (0.99, 0.9999), (0.1, 0.5), (0.999999, 0.9999999), (0, 0.999), (0.9, 0)]
)
def test_the_factor(bs, count):
    found = factor(adamfn.bias_correct(*bs), count)
    assert found == pytest.approx(expected_factor(*bs, count), rel=3e-7)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bs", [(0.9, 0.999), (0.99, 0.9999), (0.1, 0.5), (0, 0.999)])
def test_the_factor_of_traced_decays(bs, count):
    # An array's b is only known to float32: the factor is right for the b it holds.
    found = jax.jit(lambda *b: factor_array(adamfn.bias_correct(*b), count))(*map(jnp.float32, bs))
    held = [float(np.float32(b)) for b in bs]
    # 1 - b^t is off by up to 2e-7, from log1p, the product with t and expm1; so is its root.
    assert float(found) == pytest.approx(expected_factor(*held, count), rel=4e-7)


def factor_array(tx, count):
    state = tx.init(jnp.ones(1))._replace(count=jnp.int32(count - 1))
    return tx.update(jnp.ones(1), state)[0][0]


def test_no_decay_needs_no_correction():
    for b in (0, 0.0, jnp.float32(0)):
        assert factor(adamfn.bias_correct(b, b), 1) == 1


def test_it_corrects_the_average_of_a_constant():
    # With b2 = 0 the ratio is mean(g) / |g|; corrected, that of a constant is its sign.
    tx = adamfn.chain(adamfn.scale_by_moments(0.97, 0.0, eps=0), adamfn.bias_correct(0.97, 0.0))
    state = tx.init(jnp.zeros(2))
    for _ in range(30):
        updates, state = tx.update(jnp.array([3.0, -1e-5]), state)
        np.testing.assert_allclose(updates, [1, -1], rtol=1e-6)


@pytest.mark.parametrize("count", [0, 41, LAST - 1, LAST])
def test_the_count_stops_at_its_last(count):
    tx = adamfn.bias_correct()
    state = tx.init(jnp.zeros(1))
    assert state._fields == ("count",)
    updates, state = tx.update(jnp.ones(1), state._replace(count=jnp.int32(count)))
    assert state.count.dtype == jnp.int32
    assert state.count == min(count + 1, LAST)
    assert np.all(np.isfinite(updates))


def test_leaves_are_rounded_once():
    # The factor itself is not rounded to the leaf's dtype first.
    g = jnp.array([1.0, 3.0, 255.0], jnp.bfloat16)
    tx = adamfn.bias_correct(0.9, 0.0)  # 10 at the first step
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_array_equal(updates, (g.astype(jnp.float32) * 10).astype(jnp.bfloat16))
