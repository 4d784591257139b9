# SPDX-License-Identifier: Apache-2.0
"""The angle of two sides: as NumPy's in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import adamfn
from adamfn.core.formulas import angle


def test_right_to_two_roundings():
    rng = np.random.default_rng(0)
    y, x = 10.0 ** rng.uniform(-20, 18, (2, 200_000))
    near = np.linspace(0, 3, 100_000)
    y, x = np.float32([*y, *near]), np.float32([*x, *np.ones_like(near)])
    expected = np.arctan2(np.float64(y), np.float64(x))
    found = angle(jnp.array(y), jnp.array(x))
    big = expected > 1e-30
    np.testing.assert_allclose(found[big], expected[big], rtol=3e-7)


@pytest.mark.parametrize(
    ("y", "x"), [(0, 0), (1, 0), (0, 1), (np.inf, 1), (1, np.inf), (np.inf, np.inf), (np.nan, 1)]
)
def test_edges(y, x):
    found = angle(jnp.float32(y), jnp.float32(x))
    np.testing.assert_allclose(found, np.float32(np.arctan2(y, x)), rtol=1e-7)


def test_what_is_not_float32_is_numpys():
    assert angle(jnp.bfloat16(1), jnp.bfloat16(1)).dtype == jnp.bfloat16


def test_a_complex_update_has_the_direction_of_mu():
    g = np.array([3 + 4j, -1j, -2], np.complex64)
    tx = adamfn.scale_by_atan2_moments()
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates / abs(updates), g / abs(g), rtol=1e-6)
