# SPDX-License-Identifier: Apache-2.0
"""The installed optax beside adamfn, step by step: `make test-peers`."""

import jax
import numpy as np
import optax
import pytest

import adamfn

MEMBERS = {
    "adam": (optax.adam(3e-3), adamfn.adam(3e-3)),
    "adamw": (optax.adamw(3e-3, weight_decay=0.1), adamfn.adamw(3e-3, weight_decay=0.1)),
    "nadam": (optax.nadam(3e-3), adamfn.adam(3e-3, nesterov=True)),
    "adamax": (optax.adamax(3e-3, eps=0.0), adamfn.adamax(3e-3, eps=0.0)),
    # optax's threshold counts from >=, and its eps is in units of the corrected root: with
    # neither in play, it is the same RAdam.
    "radam": (optax.radam(3e-3, b2=0.99, eps=0.0), adamfn.radam(3e-3, b2=0.99, eps=0.0)),
}


def run(tx, params, grads):
    """The updates of all steps, from gradients that do not depend on the parameters."""

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.jit(lambda grads: jax.lax.scan(step, (params, tx.init(params)), grads)[1])(grads)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("seed", range(3))
def test_follows_optax(member, seed):
    theirs, ours = MEMBERS[member]
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((100, 64)).astype(np.float32) * 10 ** rng.uniform(-3, 1, 64)
    params = rng.standard_normal(64).astype(np.float32)
    found = [run(tx, params, grads) for tx in (theirs, ours)]
    # optax's 1 - b2^t is up to 2e-5 off, and RAdam's rho, where its terms cancel, 1e-4.
    tolerance = 3e-4 if member == "radam" else 3e-5
    np.testing.assert_allclose(*found, atol=tolerance * np.abs(found[0]).max())
